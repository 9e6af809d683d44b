"""Run one stage: `bash scripts/launch.sh projects/llava_mod/train_stage.py CONFIG ... [field=value ...]`."""

from projects.llava_mod.build import job
from projects.llava_mod.config import LlavaModConfig
from vlmkd.train.run import main

if __name__ == "__main__":
    main(LlavaModConfig, job)
