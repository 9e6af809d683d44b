"""Run one stage: `bash scripts/launch.sh projects/matvlm/train_distill.py CONFIG ... [field=value ...]`."""

from projects.matvlm.config import MatvlmConfig
from vlmkd.train.run import main
from vlmkd.train.trainer import Job


def job(cfg: MatvlmConfig) -> Job:
    """The job of a run; surgery imports transformers, which `--help` and a dry run need not wait for."""
    from projects.matvlm.build import job as build

    return build(cfg)


if __name__ == "__main__":
    main(MatvlmConfig, job)
