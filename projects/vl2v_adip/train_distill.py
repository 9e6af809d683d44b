"""Every other method: `bash scripts/launch.sh projects/vl2v_adip/train_distill.py CONFIG.yaml [field=value ...]`."""

from projects.vl2v_adip.build import job
from projects.vl2v_adip.config import DistillConfig
from vlmkd.train.run import main

if __name__ == "__main__":
    main(DistillConfig, job)
