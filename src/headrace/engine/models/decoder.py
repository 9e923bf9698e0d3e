"""One decoder-only transformer for Llama and Gemma 3: the differences are data (Hyperparameters).

Works on a step's flat batch of tokens, request after request. Owns the order of operations; must not know how
they are computed (`operations`), where weights come from, or who asks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.engine.operations.interface import Blocks
from headrace.engine.operations.memory import LayerMemory, own_memory
from headrace.engine.protocol import StepInput


class Decoder:
    """A model's forward pass over paged KV memory. Stateless between steps, apart from the KV caches."""

    def __init__(self, num_layers: int, blocks: Blocks) -> None:
        self._num_layers = num_layers
        self._blocks = blocks

    def new_kv_caches(
        self, num_blocks: int, block_size: int, memory: LayerMemory = own_memory
    ) -> list[Tensor]:
        """One cache per layer, for `forward`."""
        return self._blocks.new_kv_caches(num_blocks, block_size, memory)

    def forward(self, batch: StepInput, caches: list[Tensor]) -> Tensor:
        """Compute one step, writing keys and values into `caches`. Returns float32 logits [S, vocab_size]."""
        blocks = self._blocks
        step = blocks.prepare(batch)
        x = blocks.embed(step)
        last = self._num_layers - 1
        for layer in range(self._num_layers):
            x = blocks.attend(layer, x, step, caches[layer])
            if layer == last and len(batch.sampled_rows_S) != len(batch.token_ids_T):
                x = x[torch.from_numpy(batch.sampled_rows_S)]  # from here on only these rows matter
            x = blocks.mlp(layer, x)
        return blocks.head(x)
