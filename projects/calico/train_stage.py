"""Run one stage: `bash scripts/launch.sh projects/calico/train_stage.py CONFIG ... [field=value ...]`."""

from projects.calico.build import job
from projects.calico.config import CalicoConfig
from vlmkd.train.run import main

if __name__ == "__main__":
    main(CalicoConfig, job)
