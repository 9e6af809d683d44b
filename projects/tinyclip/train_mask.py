"""Learn a TinyCLIP student's shape: `bash scripts/launch.sh projects/tinyclip/train_mask.py CONFIG.yaml [field=value ...]`."""

from projects.tinyclip.build import mask_job
from projects.tinyclip.config import MaskConfig
from vlmkd.train.run import main

if __name__ == "__main__":
    main(MaskConfig, mask_job)
