"""Slices of a vocabulary on several ranks give what the whole gives; FSDP2 heads are no slices."""

import pytest
import torch
import torch.distributed as dist
from close import DEVICE, PATHS, NoLargeTensor, assert_gradient_close, running
from shards import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from reflux.kernels._divergence import DIVERGENCES
from reflux.kernels._parallel import VocabShard, common_width, local_head, local_width, merge_sums
from reflux.kernels.linear_kl import linear_kl
from reflux.kernels.token_kl import token_kl

# numpy, about -inf - -inf in masked lanes; torch, about its own mesh API
pytestmark = pytest.mark.filterwarnings("ignore")
T, D, E, V = 4, 6, 5, 90  # V real tokens in heads of 100 rows
# uneven; the third of three ranks holds nothing but padding
CUTS = {2: (0, 33, 100), 3: (0, 40, 93, 100)}


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    shapes = (T, D), (100, D), (100,), (T, E), (100, E), (100,)
    tensors = [torch.randn(s, generator=g, dtype=dtype) for s in shapes]
    return tensors, torch.randn(T, generator=g), torch.tensor([3, 0, 2])


def linear(tensors, *, rows, weight, **options):
    """total, kl and the gradients in hidden, head and bias."""
    x_TD, head_VD, bias_V, y_TE, teacher_VE, teacher_bias_V = (t.detach().clone() for t in tensors)
    leaves = [t.requires_grad_() for t in (x_TD, head_VD, bias_V)]
    out = linear_kl(
        x_TD,
        head_VD,
        y_TE,
        teacher_VE,
        student_bias=bias_V,
        teacher_bias=teacher_bias_V,
        rows=rows,
        weight=weight,
        vocab_size=V,
        **options,
    )
    return out.total.detach(), out.kl, *torch.autograd.grad(out.total * -0.7, leaves)


def token(logits, **options):
    z_TV, u_TV = (x.detach().clone() for x in logits)
    out = token_kl(z_TV.requires_grad_(), u_TV, vocab_size=V, **options)
    return out.total.detach(), out.kl, *torch.autograd.grad(out.total * -0.7, z_TV)


def slices_are_the_whole(path: str) -> None:
    tensors, weight_T, rows_M = inputs()
    start, end = CUTS[dist.get_world_size()][dist.get_rank() :][:2]
    shard, cut = VocabShard(dist.group.WORLD.group_name, start), slice(start, end)
    local = [t[cut] if t.shape[0] == 100 else t for t in tensors]
    logits = [tensors[i] @ tensors[i + 1].t() * 3 for i in (0, 3)]
    logits[0][1, 3] = -torch.inf  # forward is inf there, whichever rank holds it
    logits[1][2, V - 1] = -torch.inf  # and reverse here
    for i, divergence in enumerate(DIVERGENCES):
        options = dict(
            divergence=divergence, beta=0.25, rows=rows_M if i % 2 else None, weight=weight_T
        )
        more = dict(
            temperature=2.0,
            scale_t2=True,
            student_softcap=4.0 if i == 2 else None,
            student_logit_scale=0.5,
        )
        with running("torch"):
            whole, (_, kl_T, dz_TV) = linear(tensors, **options, **more), token(logits, **options)
        with running(path, 64):
            _, same_T, dz_TL = token([x[:, cut] for x in logits], **options, shard=shard)
            # two rows a chunk
            sliced = linear(
                local, **options, **more, shard=shard, workspace_mb=2 * 8 * 45 * 8 / 2**20
            )
        torch.testing.assert_close(same_T, kl_T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(dz_TL, dz_TV[:, cut], rtol=1e-9, atol=1e-12)
        for what, a, b in zip(("total", "kl", "dhidden", "dhead", "dbias"), sliced, whole):
            torch.testing.assert_close(
                a,
                b[cut] if what in ("dhead", "dbias") else b,
                rtol=1e-9,
                atol=1e-12,
                msg=divergence + what,
            )


@pytest.mark.parametrize("path, ranks", [("torch", 2), ("torch", 3), ("kernel", 3)])
def test_slices_are_the_whole(path, ranks):
    run_on_ranks(slices_are_the_whole, path, ranks=ranks)


def a_rank_with_nan(path: str) -> list[bool]:
    logits = [torch.randn(3, 30, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    logits[0][1, :] = torch.nan if dist.get_rank() else 0.0
    logits[0][2, :] = -torch.inf if dist.get_rank() else 0.0
    shard = VocabShard(dist.group.WORLD.group_name, 30 * dist.get_rank())
    with running(path, 64):
        out = token_kl(*logits, divergence="reverse", vocab_size=60, shard=shard)
    return out.kl.isfinite().tolist()


@pytest.mark.parametrize("path", PATHS)
def test_a_nan_on_one_rank_is_seen_by_all_and_a_banned_slice_harms_nobody(path):
    assert run_on_ranks(a_rank_with_nan, path) == [[True, False, True]] * 2


def merged_on_a_rank():
    """Columns: mass on both ranks, on rank 0 only, on none."""
    inf, rank = torch.inf, dist.get_rank()
    tops = [[1.0, 2.0, -inf], [3.0, -inf, -inf]][rank]
    return [
        x.tolist()
        for x in merge_sums(
            torch.tensor(tops), torch.tensor([[1.0, 2.0, 0.0]]), dist.group.WORLD.group_name
        )
    ]


def test_slices_without_mass_add_nothing_and_no_mass_anywhere_is_zero_not_nan():
    for top_C, ((both, one, none),) in run_on_ranks(merged_on_a_rank):
        assert top_C == [3.0, 2.0, -torch.inf] and one == 2.0 and none == 0.0
        assert both == pytest.approx(1 + torch.tensor(-2.0).exp().item())


class Head(nn.Module):
    """What a trainer wraps: the op runs in the forward, where FSDP2 has gathered the weight."""

    def __init__(self, head_VD):
        super().__init__()
        self.weight = nn.Parameter(head_VD)

    def forward(self, x_TD, y_TE, teacher_VE):
        return linear_kl(x_TD, self.weight, y_TE, teacher_VE, divergence="jsd", vocab_size=V).total


def fsdp_head():
    """Gradients of this rank's hidden states and of the whole head; 3 tokens here, 1 there."""
    (x_TD, head_VD, _, y_TE, teacher_VE, _), *_ = inputs()
    mine = slice(0, 3) if dist.get_rank() == 0 else slice(3, 4)
    head = fully_shard(Head(head_VD), mesh=init_device_mesh("cpu", (2,)))
    head.set_gradient_divide_factor(1.0)
    head.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it reduces
    outside = None
    try:
        linear_kl(x_TD, head.weight, y_TE, teacher_VE)
    except ValueError as error:
        outside = str(error)
    hidden = x_TD[mine].requires_grad_()
    head(hidden, y_TE[mine], teacher_VE).backward()
    return hidden.grad, head.weight.grad.full_tensor(), outside


def test_a_head_under_fsdp2_equals_one_rank():
    (x_TD, head_VD, _, y_TE, teacher_VE, _), *_ = inputs()
    head = Head(head_VD)
    head(x_TD.requires_grad_(), y_TE, teacher_VE).backward()
    (dx0_TD, dhead_VD, outside), (dx1_TD, same_VD, _) = run_on_ranks(fsdp_head)
    torch.testing.assert_close(torch.cat([dx0_TD, dx1_TD]), x_TD.grad)
    torch.testing.assert_close(dhead_VD, head.weight.grad)
    torch.testing.assert_close(same_VD, dhead_VD, rtol=0, atol=0)
    assert "inside the forward" in outside and "VocabShard.of(head)" in outside


def tensor_parallel_head():
    """A DTensor head, as ColwiseParallel leaves it: it knows its slice, its gradient is sharded."""
    tensors, _, _ = inputs()
    x_TD, y_TE, mesh = tensors[0], tensors[3], init_device_mesh("cpu", (2,))
    head, bias, teacher, teacher_bias = (
        distribute_tensor(tensors[i], mesh, [Shard(0)]).requires_grad_(i < 3) for i in (1, 2, 4, 5)
    )
    out = linear_kl(
        x_TD,
        head,
        y_TE,
        teacher,
        student_bias=bias,
        teacher_bias=teacher_bias,
        vocab_size=V,
        shard=VocabShard.of(head),
    )
    out.total.backward()
    mistakes = []
    for wrong in (
        lambda: VocabShard.of(distribute_tensor(tensors[1], mesh, [Replicate()])),
        lambda: local_head(
            "op", distribute_tensor(tensors[1][:90], mesh, [Shard(0)]), VocabShard.of(head)
        ),
        lambda: linear_kl(x_TD, head, y_TE, teacher, shard=VocabShard.of(head)),
    ):
        try:
            wrong()
        except ValueError as error:
            mistakes.append(str(error))
    return out.kl, head.grad.full_tensor(), bias.grad.full_tensor(), mistakes


def test_a_tensor_parallel_head_equals_one_rank():
    tensors, _, _ = inputs()
    _, kl_T, _, dhead_VD, dbias_V = linear(tensors, rows=None, weight=None)
    ranks = run_on_ranks(tensor_parallel_head)
    for same_T, same_VD, same_V, _ in ranks:
        torch.testing.assert_close(same_T, kl_T)
        torch.testing.assert_close(same_VD * -0.7, dhead_VD)
        torch.testing.assert_close(same_V * -0.7, dbias_V)
    for word, message in zip(
        ("want a DTensor", "same rows", "vocab_size"), ranks[1][-1], strict=True
    ):
        assert word in message


def test_without_a_group_nothing_is_exchanged():
    top_C, sums_NC = torch.tensor([1.0, -torch.inf]), torch.tensor([[2.0, 0.0]])
    assert all(a is b for a, b in zip(merge_sums(top_C, sums_NC, ""), (top_C, sums_NC)))
    assert common_width(100, "") == 100 and [
        local_width(40, 90, start) for start in (0, 40, 80, 120)
    ] == [40, 40, 10, 0]


def memory_of_a_slice() -> None:
    x_TD, head_VD = torch.randn(300, 4, requires_grad=True), torch.randn(200, 4, requires_grad=True)
    # T25: neither the whole nor a slice of the logits of all tokens
    with running("torch"), NoLargeTensor(300 * 200 // 2):
        linear_kl(
            x_TD,
            head_VD,
            x_TD,
            head_VD * 2,
            divergence="jsd",
            vocab_size=400,
            workspace_mb=0.5,
            shard=VocabShard(dist.group.WORLD.group_name, 200 * dist.get_rank()),
        ).total.backward()


def test_the_logits_of_a_slice_never_exist_whole():
    run_on_ranks(memory_of_a_slice)


def test_bf16_partial_sums_of_hidden_gradients_stay_close():
    whole = run_on_ranks(bf16_dhidden)
    assert_gradient_close(whole[0][0], whole[0][1], "dhidden", 1.5e-2)
    # the same bits on both ranks
    torch.testing.assert_close(whole[0][0], whole[1][0], rtol=0, atol=0)


def bf16_dhidden():
    tensors, weight_T, _ = inputs(torch.bfloat16)
    tensors = [t.to(DEVICE) for t in tensors]
    start, end = CUTS[2][dist.get_rank() :][:2]
    local = [t[start:end] if t.shape[0] == 100 else t for t in tensors]
    options = dict(rows=None, weight=weight_T.to(DEVICE))
    whole = linear([t.double() for t in tensors], **options)[2]
    return linear(local, **options, shard=VocabShard(dist.group.WORLD.group_name, start))[
        2
    ].cpu(), whole.cpu()
