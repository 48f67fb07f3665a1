// Every wrapper of device.cuh once, by one warp: what a GPU answers must be what the shim answers, bit for bit.
// q: 256 numbers of 16 bits, k: 512 more for the copies; lse: 32 slots of 32 lanes, read as bits.
#include "attention.cu"

template <class T> __global__ void __launch_bounds__(32) conformance(const Params p) {
    SHARED_MEMORY(u16, smem, 16);
    const int lane = threadIdx.x;
    int slot = 0;
    u32* out = (u32*)p.lse;
    auto put = [&](u32 x) { out[slot++ * 32 + lane] = x; };
    cp_async16(smem + lane * 8, p.q.data + lane * 8, true);
    cp_async16(smem + 256 + lane * 8, p.k.data + lane * 8, true);
    cp_async16(smem + 512 + lane * 8, p.k.data + 256 + lane * 8, lane % 3 == 0);  // zeros in the others
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const u16* row = smem + lane * 8;
    u32 a[4], b[4], r[4];
    ldmatrix<4, false>(a, row);
    for (int i = 0; i < 4; i++) put(a[i]);
    ldmatrix<4, true>(b, row);
    for (int i = 0; i < 4; i++) put(b[i]);
    ldmatrix<2, false>(r, row);
    put(r[0]), put(r[1]);
    ldmatrix<2, true>(r, row);
    put(r[0]), put(r[1]);
    ldmatrix<1, false>(r, row);
    put(r[0]);
    float c[4] = {1.f * lane, 2.f, -3.f, 0.5f}, x, y;
    mma_k16<T>(c, a, b[0], b[1]);
    for (int i = 0; i < 4; i++) put(__float_as_int(c[i]));
    mma_k8<T>(c, a[0], a[1], b[2]);
    for (int i = 0; i < 4; i++) put(__float_as_int(c[i]));
    unpack<T>(a[0], x, y);
    put(__float_as_int(x)), put(__float_as_int(y));
    put(pack<T>(x / 3.f, y * 1.0001f));
    put(__float_as_int(shfl_xor(x, 1))), put(__float_as_int(shfl_xor(x, 2)));
    put(*(const u32*)(smem + 256 + lane * 8)), put(*(const u32*)(smem + 512 + lane * 8 + 6));
    put(__float_as_int(ex2_poly(-0.37f * lane)));
    put(__float_as_int(ex2(-0.37f * lane)));  // the only approximate one
}
