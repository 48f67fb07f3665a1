"""The text of device_sm90.cuh. wgmma wants one asm statement for every width, so a loop writes them."""

from __future__ import annotations

WIDTHS = (48, 64, 80, 96, 128, 160)  # columns of a product: keys of a tile, or head widths filled up to 16

HEAD = r"""
#pragma once
#include "device.cuh"
struct alignas(64) TensorMap {
    unsigned long long opaque[16];
};
DEV void mbar_init(u32 bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
DEV void mbar_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void mbar_expect(u32 bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEV void mbar_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
DEV void mbar_wait(u32 bar, int parity) {
    asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\nbra again;\ndone:\n}" ::"r"(bar), "r"(parity) : "memory");
}
DEV void tma_load(u32 dst, const TensorMap& map, int d, int token, int head, int batch, u32 bar) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];"
                 ::"r"(dst), "l"(&map), "r"(d), "r"(token), "r"(head), "r"(batch), "r"(bar) : "memory");
}
template <int N> DEV void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEV void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEV void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// c 64xN (+)= a * b: ss with both in shared memory and K contiguous, rs with a in registers and N contiguous in b.
template <class T, int N> DEV void wgmma_ss(float (&c)[N / 8][4], u64 a, u64 b, bool add);
template <class T, int N> DEV void wgmma_rs(float (&c)[N / 8][4], const u32 (&a)[4], u64 b);
"""


def text() -> str:
    """device_sm90.cuh."""
    return HEAD + "".join(_wgmma(n, *of) for n in WIDTHS for of in (("Half", "f16"), ("Bf16", "bf16")))


def _wgmma(n: int, tag: str, type_: str) -> str:
    k = n // 2  # accumulators of a thread, the asm's first operands
    sums = ", ".join(f"%{i}" for i in range(k))
    outputs = ", ".join(f'"+f"(c[{i // 4}][{i % 4}])' for i in range(k))
    name = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{type_}.{type_}"
    ss = f"{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{k + 2}, 0;\\n{name} {{{sums}}}, %{k}, %{k + 1}, p, 1, 1, 0, 0;\\n}}"
    rs = f"{name} {{{sums}}}, {{%{k}, %{k + 1}, %{k + 2}, %{k + 3}}}, %{k + 4}, 1, 1, 1, 1;"
    return f"""
template <> DEV void wgmma_ss<{tag}, {n}>(float (&c)[{n // 8}][4], u64 a, u64 b, bool add) {{
    asm volatile("{ss}" : {outputs} : "l"(a), "l"(b), "r"((int)add));
}}
template <> DEV void wgmma_rs<{tag}, {n}>(float (&c)[{n // 8}][4], const u32 (&a)[4], u64 b) {{
    asm volatile("{rs}" : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
"""
