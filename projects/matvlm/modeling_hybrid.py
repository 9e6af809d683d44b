"""A hybrid for `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`: attention, and Mamba-2 in its place.

`python -m projects.matvlm.convert --transformers` writes this file into a folder, with what it imports beside it and
with the name of the decoder's class in place of Llama's. Nothing else of vlmkd is needed there.
"""

from __future__ import annotations

from types import SimpleNamespace

from transformers import LlamaConfig, LlamaForCausalLM

from projects.matvlm.mixer import FLOAT32
from projects.matvlm.surgery import to_hybrid


class HybridLlamaConfig(LlamaConfig):
    """As the decoder's; `matvlm` says which layers are Mamba-2. A type of its own, which no stock class loads half of."""

    model_type = "matvlm_llama"


class HybridLlamaForCausalLM(LlamaForCausalLM):
    """As the decoder's."""

    config_class = HybridLlamaConfig
    _keep_in_fp32_modules_strict = [f"self_attn.{name}" for name in FLOAT32]

    def __init__(self, config: HybridLlamaConfig) -> None:
        super().__init__(config)
        to_hybrid(self, SimpleNamespace(**config.matvlm))
