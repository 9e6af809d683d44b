"""Stage 1, learn a teacher's prompts: `bash scripts/launch.sh projects/promptkd/train_teacher.py CONFIG.yaml [field=value ...]`."""

from projects.promptkd.build import teacher_job
from projects.promptkd.config import TeacherConfig
from vlmkd.train.run import main

if __name__ == "__main__":
    main(TeacherConfig, teacher_job)
