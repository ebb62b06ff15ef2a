# SPDX-License-Identifier: Apache-2.0
"""decode on CUDA: every kernel of the table beside the float64 oracle, within half_budget.py.

The same cases run on the CPU backend for two page configurations: they prove the cases and budgets
where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import seeds
from cuda_kernels import DECODE_KERNELS, multiplies_bytes, skip_without_code
from decode_inputs import (
    MANY,
    PAGES,
    Built,
    Case,
    Cases,
    Contents,
    Page,
    Queries,
    build,
    build_many,
    family_cases,
    format_cases,
    formats_of,
    many_cases,
    on_device,
    on_host,
    rng_of,
    rotated_formats_of,
    shape_cases,
)
from half_budget import SUMMARY, assert_close
from samples import FORMATS

from bitdecoding import KvFormat, PagedKvCache


def decode(cache: PagedKvCache, case: Case, q: Any, kernel: str | None) -> tuple[Any, Any]:
    """(out, lse or None) as float32 NumPy, through memory full of NaN."""
    import torch

    out = torch.full_like(q, float("nan"), memory_format=torch.contiguous_format)
    options: dict[str, Any] = {"out": out, "softmax_scale": case.scale, "kernel": kernel}
    lse = None
    if case.queries.lse:
        _, sums = cache.decode(q, return_softmax_lse=True, **options)
        lse = sums.cpu().numpy()
    else:
        assert cache.decode(q, **options) is out
    return out.float().cpu().numpy(), lse


def check(built: Built, device: str, kernel: str | None, kind: str) -> None:
    cache = on_device(built.cache, device)
    for number, case in enumerate(built.cases):
        q = case.q.to(device)
        if number % 2 == 1:  # a view, from (B, Hq, Sq, D)
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
        out, lse = decode(cache, case, q, kernel)
        what = f"seed {seeds.SEED}: {kernel or device}, {case.contents}, {case.queries}"
        of_bytes = multiplies_bytes(kernel, case.queries.ratio * case.queries.tokens)
        dtype = case.queries.dtype
        assert_close(out, lse, case.expected, dtype, kind=kind, what=what, of_bytes=of_bytes)
    if device != "cpu":
        cache.check()


def check_all(
    cases: Cases, device: str, kernel: str | None, kind: str, times: int | None = None
) -> None:
    """Every case is run, repeated so often in one batch; what fails is reported together."""
    failures = []
    for contents, queries in cases:
        try:
            with skip_without_code():
                built = build_many(contents, queries, times) if times else build(contents, queries)
                check(built, device, kernel, kind.format(contents.kind))
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, f"{len(failures)} of {len(cases)} fail:\n" + "\n".join(failures[:12])


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", DECODE_KERNELS)
class TestEveryKernel:
    def test_every_format(self, torch: Any, kernel: str) -> None:
        formats = formats_of(Page.of_kernel(kernel))
        cases = [case for f in formats for case in format_cases(f)]
        check_all(cases, "cuda", kernel, "every format")

    def test_rotations(self, torch: Any, kernel: str) -> None:
        formats = rotated_formats_of(Page.of_kernel(kernel))
        cases = [case for f in formats for case in format_cases(f)]
        check_all(cases, "cuda", kernel, "rotations")

    def test_shapes(self, torch: Any, kernel: str) -> None:
        check_all(shape_cases(Page.of_kernel(kernel)), "cuda", kernel, "shapes")

    def test_much_work(self, torch: Any, kernel: str) -> None:
        """So much that every warp has many items: then they may be whole pages."""
        check_all(many_cases(Page.of_kernel(kernel)), "cuda", kernel, "much work", MANY)

    def test_families(self, torch: Any, kernel: str) -> None:
        check_all(family_cases(Page.of_kernel(kernel)), "cuda", kernel, "family {}")


@pytest.mark.parametrize("page", [PAGES[0], PAGES[-1]], ids=str)
def test_cases_and_budgets_on_a_cpu(torch: Any, page: Page) -> None:
    cases = [case for f in formats_of(page)[::5] for case in format_cases(f)]
    check_all(cases, "cpu", None, "cpu: every format")
    cases = [case for f in rotated_formats_of(page) for case in format_cases(f)]
    check_all(cases, "cpu", None, "cpu: rotations")
    check_all(shape_cases(page), "cpu", None, "cpu: shapes")
    check_all(family_cases(page), "cpu", None, "cpu: family {}")
    check_all(many_cases(page), "cpu", None, "cpu: much work", 2)
    assert any(kind == "cpu: shapes" for kind, _ in SUMMARY.found)


def test_a_wrong_code_exceeds_the_budget(torch: Any) -> None:
    contents = Contents(FORMATS[0], (400, 300), 1, 0, 64)
    built = build(contents, (Queries(4),))
    spoilt = Built(on_host(built.cache), built.cases)
    page = spoilt.cache.block_table[1, 0]
    spoilt.cache.pool[page, 0, 1024:2048] ^= 8  # the high bits of codes of K
    check(built, "cpu", None, "cpu: a wrong code")
    with pytest.raises(AssertionError, match="relative error"):
        check(spoilt, "cpu", None, "cpu: a wrong code")


@pytest.mark.gpu
def test_the_default_kernel_serves_every_format(torch: Any) -> None:
    for page in PAGES:
        check_all(format_cases(formats_of(page)[-1]), "cuda", None, "default kernel")


@pytest.mark.gpu
def test_formats_of_one_kernel_in_turns(torch: Any) -> None:
    """They need different amounts of shared memory; a plan made once serves all calls."""
    names = ("k4v4_c128_v128_p128_d128", "k4v4_c32_v32_p128_d128")
    built = [build(Contents(KvFormat.parse(n), (700, 129), 2), (Queries(4),)) for n in names]
    caches = [on_device(b.cache, "cuda") for b in built]
    queries = [b.cases[0].q.cuda() for b in built]
    rounds = [[c.decode(q) for c, q in zip(caches, queries, strict=True)] for _ in range(2)]
    for first, second in zip(*rounds, strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("f", FORMATS, ids=str)
def test_bits_repeat_beside_other_work(torch: Any, f: KvFormat) -> None:
    contents = Contents(f, (3000, 129, 0, 700), 2, 16, 64)
    (case,) = build(contents, (Queries(4),)).cases
    cache = on_device(build(contents, (Queries(4),)).cache, "cuda")
    q = case.q.cuda()
    first, first_lse = cache.decode(q, return_softmax_lse=True)
    torch.cuda.synchronize()
    noise = torch.randn(2048, 2048, device="cuda")
    other, own = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    results = []
    for round_ in range(10):
        with torch.cuda.stream(other):
            for _ in range(4):
                noise = torch.mm(noise, noise).clamp_(-1, 1)
        with torch.cuda.stream(own if round_ % 2 else torch.cuda.current_stream()):
            results.append(cache.decode(q, return_softmax_lse=True))
        if round_ % 2:
            own.synchronize()  # calls on one cache must not overlap
        else:
            torch.cuda.current_stream().synchronize()
    torch.cuda.synchronize()
    for out, lse in results:
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


@pytest.mark.gpu
def test_an_explicit_stream_and_the_current_one(torch: Any) -> None:
    contents = Contents(FORMATS[0], (700, 90), 2, 16, 64)
    built = build(contents, (Queries(4),))
    (case,) = built.cases
    cache, q = on_device(built.cache, "cuda"), case.q.cuda()
    expected = cache.decode(q)
    late, out = torch.zeros_like(q), torch.empty_like(q)
    stream = torch.cuda.Stream()
    for explicit in (False, True):
        late.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # about 0.1 s: any other stream would read the zeros
            late.copy_(q)
            if not explicit:
                cache.decode(late, out=out)
        if explicit:
            cache.decode(late, out=out, stream=stream.cuda_stream)
        stream.synchronize()
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_no_hidden_synchronisation(torch: Any) -> None:
    f = FORMATS[0]
    k = torch.randn(3, 300, 2, f.head_dim, device="cuda").half()
    counts = torch.tensor([300, 0, 17], dtype=torch.int32, device="cuda")
    cache = PagedKvCache(f, batch=3, num_kv_heads=2, max_tokens=2000, device="cuda")

    def step() -> None:
        cache.append(k, k, num_tokens=counts)
        cache.append(k, k)
        cache.decode(k[:, :1], return_softmax_lse=True)
        cache.reset()

    step()  # loads the kernels, allocates the workspace and the memory of the outputs
    step()
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # about 0.5 s
        step()
        done.record()
        waited = done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited, "a call waited for the device"
    torch.cuda.synchronize()
    assert done.query()


@pytest.mark.gpu
def test_large_scores_stay_finite(torch: Any) -> None:
    """Scores of up to a million: one token takes all the weight, whichever it is."""
    for f in FORMATS:
        contents = Contents(f, (700, 90), 2, 4, 9, "outliers")
        queries = tuple(Queries(4, kind="outliers", softmax_scale=scale) for scale in (10.0, -10.0))
        built = build(contents, queries)
        cache = on_device(built.cache, "cuda")
        for case in built.cases:
            out, lse = decode(cache, case, case.q.cuda(), None)
            assert np.all(np.isfinite(out))
            assert lse is not None
            assert np.all(np.isfinite(lse))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [4, 8])  # per KV head: rows that multiply bytes, and halves
@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_query_not_finite_spoils_its_own_row(torch: Any, heads: int, value: float) -> None:
    rng = rng_of("spoilt query")
    for f in FORMATS:
        cache = PagedKvCache(f, batch=1, num_kv_heads=1, max_tokens=400, device="cuda")
        k, v = rng.standard_normal((2, 1, 333, 1, f.head_dim)).astype(np.float16)
        cache.append(torch.from_numpy(k).cuda(), torch.from_numpy(v).cuda())
        q = torch.from_numpy(rng.standard_normal((1, 1, heads, f.head_dim))).half()
        q[0, 0, 2, 5] = value
        out, lse = cache.decode(q.cuda(), return_softmax_lse=True)
        spoilt = torch.arange(heads) == 2
        assert torch.equal(out[0, 0].isnan().all(-1).cpu(), spoilt), f
        assert torch.equal(out[0, 0].isfinite().all(-1).cpu(), ~spoilt), f
        assert torch.equal(lse[0, :, 0].isnan().cpu(), spoilt), f


@pytest.mark.gpu
def test_no_queries(torch: Any) -> None:
    f = FORMATS[0]
    cache = PagedKvCache(f, batch=2, num_kv_heads=2, max_tokens=10, device="cuda")
    q = torch.zeros(2, 0, 4, f.head_dim, dtype=torch.float16, device="cuda")
    out, lse = cache.decode(q, return_softmax_lse=True)
    assert (tuple(out.shape), tuple(lse.shape)) == ((2, 0, 4, f.head_dim), (2, 4, 0))


def ring_cache(f: KvFormat, more_rows: int) -> PagedKvCache:
    """Of arrays whose ring has more rows than it needs; 3 and 5 are first and last tokens."""
    least = PagedKvCache(f, batch=1, num_kv_heads=1, max_tokens=900, keep_first=3, keep_last=5)
    shape = list(least.side.shape)
    shape[3] += more_rows
    return PagedKvCache.wrap(
        f,
        pool=least.pool,
        side=np.full(shape, np.nan, np.float16),
        block_table=least.block_table,
        slots=least.slots,
        lengths=least.lengths,
        packed=least.packed,
        keep_first=3,
        keep_last=5,
    )


@pytest.mark.gpu
def test_rings_of_more_rows(torch: Any) -> None:
    f = FORMATS[2]
    rng = rng_of("rings")
    k, v = rng.standard_normal((2, 1, 800, 1, f.head_dim)).astype(np.float16)
    q = torch.from_numpy(rng.standard_normal((1, 1, 4, f.head_dim))).half()
    for more_rows in (16, 48):
        cache = ring_cache(f, more_rows)
        for begin in range(0, 800, 50):
            cache.append(k[:, begin : begin + 50], v[:, begin : begin + 50])
            expected = torch.from_numpy(cache.decode(q.float().numpy()))
            out = on_device(cache, "cuda").decode(q.cuda()).cpu().float()
            assert (out - expected).norm() < 2e-3 * expected.norm(), (more_rows, begin)
    odd = on_device(ring_cache(f, 9), "cuda")
    with pytest.raises(ValueError, match="tail_tokens = 89; allowed on a CUDA device: multiples"):
        odd.decode(q.cuda())


@pytest.mark.gpu
def test_what_the_kernels_cannot_read_is_refused(torch: Any) -> None:
    f = FORMATS[0]
    cache = PagedKvCache(f, batch=1, num_kv_heads=1, max_tokens=300, device="cuda")
    q = torch.zeros(1, 1, 4, f.head_dim, device="cuda")
    with pytest.raises((TypeError, ValueError), match=r"q.*float32.*float16, bfloat16"):
        cache.decode(q)
    out = torch.empty(4 * f.head_dim + 1, dtype=torch.float16, device="cuda")
    with pytest.raises(ValueError, match=r"out address = \d+; allowed.*multiples of 8"):
        cache.decode(q.half(), out=out[1:].view(q.shape))
    with pytest.raises(NotImplementedError, match=r"no_such_row.*kernels of this build"):
        cache.decode(q.half(), kernel="no_such_row")
    with pytest.raises(NotImplementedError, match=r"k2v2_t_d64_n8.*kernels of this build"):
        cache.decode(q.half(), kernel="decode_sm90_k2v2_t_d64_n8")  # of another format
    with pytest.raises(ValueError, match=r"q: device = cpu; allowed: cuda:0"):
        cache.decode(q.half().cpu())
    own = PagedKvCache(f, batch=1, num_kv_heads=1, max_tokens=300)
    with pytest.raises((TypeError, ValueError), match=r"kernel"):
        own.decode(np.zeros((1, 1, 4, f.head_dim), np.float16), kernel="decode_sm90_k4v4_c_d128_n8")
