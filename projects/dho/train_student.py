"""Train a DHO student, or a baseline: `bash scripts/launch.sh projects/dho/train_student.py CONFIG.yaml [field=value ...]`."""

from projects.dho.build import student_job
from projects.dho.config import DhoConfig
from vlmkd.train.run import main

if __name__ == "__main__":
    main(DhoConfig, student_job)
