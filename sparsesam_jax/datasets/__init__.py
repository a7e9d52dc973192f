"""Whole data sets: photos read ahead, embedded or segmented shard by shard into one store."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from sparsesam_jax.datasets.embedding_store import EmbeddingStore

__all__ = ["EmbeddingStore"]

# The processes that decode photos import this package, and need no JAX.
__getattr__, __dir__, _ = lazy_loader.attach(
    __name__, submod_attrs={"embedding_store": ["EmbeddingStore"]}
)
