"""Fine-tuning of causal language models with low-rank adapters. Knows no web, no queue, no rows."""
