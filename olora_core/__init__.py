"""Fine-tuning of causal language models with low-rank adapters. Knows no web, no queue, no rows."""

import logging

# Of the packages for quantised bases: transformers imports torchao wherever it is installed, which then tells
# what this machine lacks, and bitsandbytes tells at every product that it casts.
for _name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
