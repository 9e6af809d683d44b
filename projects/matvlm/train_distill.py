"""Run one stage: `bash scripts/launch.sh projects/matvlm/train_distill.py CONFIG ... [field=value ...]`."""

from projects.matvlm.build import job
from projects.matvlm.config import MatvlmConfig
from vlmkd.train.run import main

if __name__ == "__main__":
    main(MatvlmConfig, job)
