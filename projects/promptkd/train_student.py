"""Stage 2, distil a student without labels: `bash scripts/launch.sh projects/promptkd/train_student.py CONFIG.yaml [field=value ...]`."""

from projects.promptkd.build import student_job
from projects.promptkd.config import StudentConfig
from vlmkd.train.run import main

if __name__ == "__main__":
    main(StudentConfig, student_job)
