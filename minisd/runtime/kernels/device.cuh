// The few hardware operations that the attention kernels use. On a GPU each is one PTX instruction; where MINISD_CPU is
// defined the same names come from the tests' shim, so that the very same kernel text runs on a CPU.
#pragma once
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct Half {};  // tag: IEEE fp16, stored as u16
struct Bf16 {};  // tag: bfloat16, stored as u16

#ifdef MINISD_CPU
#include "shim.h"
#else
#define DEV __device__ __forceinline__
#define INF __int_as_float(0x7f800000)
#define SHARED_MEMORY(type, name, alignment) extern __shared__ __align__(alignment) type name[]

DEV u32 smem_ptr(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ldmatrix: lane i gives the address of row i % 8 of the 8x8 matrix i / 8; register j of lane l receives the elements
// [l / 4][2 * (l % 4)] and the next of matrix j; transposed, [2 * (l % 4)][l / 4] and the one below.
template <int N, bool TRANS> DEV void ldmatrix(u32 (&r)[4], const u16* row) {
    const u32 a = smem_ptr(row);
    if constexpr (N == 4 && TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
    else if constexpr (N == 4)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
    else if constexpr (N == 2 && TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1]) : "r"(a) : "memory");
    else if constexpr (N == 2)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1]) : "r"(a) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(a) : "memory");
}

// c 16x8 += a 16xK * b Kx8 on the tensor cores, K = 16 or 8; c in fp32.
#define MMA(tag, type)                                                                                               \
    template <> DEV void mma_k16<tag>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {                            \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                                           \
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                                  \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                         \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                         \
    }                                                                                                                \
    template <> DEV void mma_k8<tag>(float (&c)[4], u32 a0, u32 a1, u32 b0) {                                        \
        asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type ".f32 "                                            \
            "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"                                                           \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));                           \
    }
template <class T> DEV void mma_k16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <class T> DEV void mma_k8(float (&c)[4], u32 a0, u32 a1, u32 b0);
MMA(Half, "f16")
MMA(Bf16, "bf16")

// An asynchronous copy of 16 bytes from global to shared memory; writes zeros, and reads nothing, where !valid.
DEV void cp_async16(u16* dst, const u16* src, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(smem_ptr(dst)), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEV void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

DEV float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
template <class T> DEV u32 pack(float lo, float hi);  // rounded to nearest even, lo in the low half
template <> DEV u32 pack<Half>(float lo, float hi) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
template <> DEV u32 pack<Bf16>(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
template <class T> DEV void unpack(u32 x, float& lo, float& hi);
template <> DEV void unpack<Half>(u32 x, float& lo, float& hi) {
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(lo), "=f"(hi) : "r"(x));
}
template <> DEV void unpack<Bf16>(u32 x, float& lo, float& hi) {
    lo = __int_as_float(x << 16);
    hi = __int_as_float(x & 0xffff0000u);
}
DEV float shfl_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
#endif
