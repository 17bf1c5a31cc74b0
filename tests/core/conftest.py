"""Tiny base models, loaded."""

from pathlib import Path

import pytest
import torch

from olora_core.bases.loading import Base
from tests.tiny_base import VOCABULARY

from .loaded_bases import fresh_base


@pytest.fixture
def llama(base_folders: dict[str, Path]) -> Base:
    """An untied Llama in fp32, as loaded."""
    return fresh_base(base_folders["llama"], name="tiny-llama")


@pytest.fixture
def tied_llama(base_folders: dict[str, Path]) -> Base:
    return fresh_base(base_folders["llama-tied"], name="tiny-llama-tied")


@pytest.fixture
def bf16_llama(base_folders: dict[str, Path]) -> Base:
    return fresh_base(base_folders["llama-bf16"], name="tiny-llama-bf16")


@pytest.fixture
def gpt2(base_folders: dict[str, Path]) -> Base:
    """GPT-2: its linear layers are Conv1D, its lm_head is tied."""
    return fresh_base(base_folders["gpt2"], name="tiny-gpt2")


@pytest.fixture(scope="session")
def token_rows() -> torch.Tensor:
    """(3, 16) random token ids."""
    return torch.randint(3, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
