"""Distil a TinyCLIP student: `bash scripts/launch.sh projects/tinyclip/train_distill.py CONFIG.yaml [field=value ...]`."""

from projects.tinyclip.build import distill_job
from projects.tinyclip.config import DistillConfig
from vlmkd.train.run import main

if __name__ == "__main__":
    main(DistillConfig, distill_job)
