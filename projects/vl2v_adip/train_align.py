"""Align or LP: `bash scripts/launch.sh projects/vl2v_adip/train_align.py CONFIG.yaml [field=value ...]`."""

from projects.vl2v_adip.build import job
from projects.vl2v_adip.config import AlignConfig
from vlmkd.train.run import main

if __name__ == "__main__":
    main(AlignConfig, job)
