"""Batch norm over the processes of a group, as ``torch.nn.SyncBatchNorm``: what its processes tell each other.

Process i has n_i values of each channel, with mean m_i and squared deviations from it M2_i; n = sum n_i. Then (Chan)

    mean = sum n_i*m_i / n    M2 = sum (M2_i + n_i*(m_i - mean)^2)    var = M2/n, unbiased M2/(n - 1)

and the gradient of a raw output needs, in the place of the b_i and c_i that a process finds by itself (see
:mod:`mbn_kernels.chain`; with the statistics given, both are sums over its values divided by n_i),

    b = sum b_i*n_i/n    c = sum c_i*n_i/n

Every process of the group takes part in every call, also one without values. Collectives are queued on the device as
kernels are; nothing here waits for a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Merged(NamedTuple):
    """Statistics of all processes' values, ``[C]`` each. Without any value, mean and var are NaN and ``unbiased`` is 0,
    which is told apart from values that are NaN: of those, all three are.
    """

    mean: Tensor
    var: Tensor
    unbiased: Tensor
    share: Tensor  # n_i/n of this process, [1]


def merge_statistics(mean: Tensor, unbiased: Tensor, count: int, group: str) -> Merged:
    """From the mean and unbiased var ``[C]`` of this process's ``count`` values per channel those of all processes, the
    same bits in each; ``group`` is the process group's name. What a process without values calls its mean is ignored.
    """
    m2 = unbiased * (count - 1) if count > 1 else torch.zeros_like(mean)
    own = torch.cat([mean.new_full((1,), count), mean, m2])
    # In float64: these numbers are few, and everything depends on them.
    counts, means, m2s = _gather(own, group).double().split([1, len(mean), len(mean)], 1)
    some, total = counts > 0, counts.sum(0)
    merged = torch.where(some, counts * means, 0.0).sum(0) / total
    m2 = torch.where(some, m2s + counts * (means - merged).square(), 0.0).sum(0)
    found = merged, m2 / total, m2 / (total - 1), count / total
    return Merged(*(t.to(mean.dtype) for t in found))


def sum_gradients(b: Tensor, c: Tensor, share: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """From this process's b and c ``[C]`` those of all processes; ``share`` is its share of the values, 0 without."""
    terms = torch.stack([b, c]) * share
    dist.all_reduce(terms, group=_process_group(group))
    return terms[0], terms[1]


def _gather(own: Tensor, group: str) -> Tensor:
    """``own`` of each process, in the order of ranks: ``[processes, len(own)]``."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name in torch 2.11
    processes = _process_group(group)
    found = own.new_empty(processes.size() * len(own))
    gather(found, own, processes)
    return found.view(processes.size(), len(own))


def _process_group(name: str):
    """The process group of that name; RuntimeError where there is none, as after destroy_process_group."""
    # There is no public function for it; torch's own collectives in compiled graphs find their group by this one.
    return dist.distributed_c10d._resolve_process_group(name)
