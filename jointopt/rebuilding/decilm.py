"""vLLM's DeciLM, a LLaMA whose blocks differ, as transformers loads it. Goes into such an export's modelling file."""

from transformers import LlamaConfig, LlamaForCausalLM

from jointopt.rebuilding.runtime import rebuild


class Entries(dict):
    """A dict whose entries are attributes too, which is how vLLM reads them."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(LlamaConfig):
    """LlamaConfig with an entry for each block."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [Entries({part: Entries(each[part]) for part in each}) for each in block_configs]


class DeciLMForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM with blocks of the sizes that config.json lists. vLLM has its own class of this name."""

    config_class = DeciLMConfig

    def __init__(self, config):
        super().__init__(config)
        rebuild(self, config.jointopt)
