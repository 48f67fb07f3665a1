// Forward attention for Hopper (sm_90a): TMA fills shared memory and wgmma multiplies out of it; one producer thread
// and WGS consumer warpgroups of 64 queries each (Shah et al. 2024, FlashAttention-3, without its ping-pong barriers). The
// product Q K_j^T of the next tile and P V_(j-1) run on the tensor cores while the softmax of tile j runs elsewhere.
//
// Shared tiles are blocks of 16 columns: rows of 32 bytes in the 32-byte swizzle of TMA and wgmma, so that every width
// that is a multiple of 16 fits without padding, and d = 40 is filled up to 48 by TMA itself, which reads zeros beyond
// a tensor's end.
#ifndef MINISD_CPU
#include "device_sm90.cuh"
#endif
#include "attention.cu"

struct Sm90Params {  // maps of [batch, heads, tokens, d]; a box is 16 columns of BLOCK queries or of N keys
    TensorMap q, k, v;
    Params p;
};

template <class T, int D, int N, int WGS, int STAGES> struct AttentionSm90 {
    static constexpr int B = (D + 15) / 16, DP = 16 * B;  // blocks of 16 columns
    static constexpr int BLOCK = 64 * WGS, THREADS = 128 * (WGS + 1);
    static constexpr int QBYTES = B * BLOCK * 32, KBYTES = B * N * 32;
    typedef Attention<T, D, N, 4, 1> A;  // for its softmax

    // The descriptor of an operand in the 32-byte swizzle: start, leading and stride byte offsets (PTX ISA).
    static DEV u64 descriptor(u32 addr, int leading, int stride) {
        return (u64)(addr >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | 3ull << 62;
    }
    // s = Q K^T, both K-major: groups of 8 rows lie 256 bytes apart
    static DEV void scores(float (&s)[N / 8][4], u32 q, u32 k) {
        #pragma unroll
        for (int b = 0; b < B; b++)
            wgmma_ss<T, N>(s, descriptor(q + b * BLOCK * 32, 16, 256), descriptor(k + b * N * 32, 16, 256), b > 0);
        wgmma_commit();
    }
    static DEV void accumulate(float (&o)[DP / 8][4], const u32 (&p)[N / 16][4], u32 v) {   // o += P V, V MN-major
        #pragma unroll
        for (int n = 0; n < N / 16; n++)
            wgmma_rs<T, DP>(o, p[n], descriptor(v + n * 512, N * 32, 256));
        wgmma_commit();
    }
    template <int POLY> static DEV void forward(const Sm90Params& m, unsigned char* raw) {
        const Params& p = m.p;
        const int head = blockIdx.y, batch = blockIdx.z, wg = threadIdx.x / 128, tiles = (p.nk + N - 1) / N;
        const u32 sq = (smem_ptr(raw) + 1023) & ~1023u, sk = sq + QBYTES, sv = sk + STAGES * KBYTES;
        // mbarriers: Q is there; for every stage, K and V are there, K and V are free again
        const u32 qfull = sv + STAGES * KBYTES, kfull = qfull + 8, vfull = kfull + 8 * STAGES;
        const u32 kfree = vfull + 8 * STAGES, vfree = kfree + 8 * STAGES;
        if (threadIdx.x == 0) {
            mbar_init(qfull, 1);
            for (int i = 0; i < STAGES; i++) {
                mbar_init(kfull + 8 * i, 1), mbar_init(vfull + 8 * i, 1);
                mbar_init(kfree + 8 * i, WGS), mbar_init(vfree + 8 * i, WGS);
            }
            mbar_fence_init();
        }
        __syncthreads();
        if (wg == WGS) {  // the producer
            setmaxnreg_dec<24>();
            if (threadIdx.x != WGS * 128) return;
            mbar_expect(qfull, QBYTES);
            for (int b = 0; b < B; b++)
                tma_load(sq + b * BLOCK * 32, m.q, b * 16, blockIdx.x * BLOCK, head, batch, qfull);
            for (int j = 0; j < tiles; j++) {
                const int st = j % STAGES, round = j / STAGES;
                mbar_wait(kfree + 8 * st, (round & 1) ^ 1);  // passes at once in the first round
                mbar_expect(kfull + 8 * st, KBYTES);
                for (int b = 0; b < B; b++)
                    tma_load(sk + st * KBYTES + b * N * 32, m.k, b * 16, j * N, head, batch, kfull + 8 * st);
                mbar_wait(vfree + 8 * st, (round & 1) ^ 1);
                mbar_expect(vfull + 8 * st, KBYTES);
                for (int b = 0; b < B; b++)
                    tma_load(sv + st * KBYTES + b * N * 32, m.v, b * 16, j * N, head, batch, vfull + 8 * st);
            }
            return;
        }
        setmaxnreg_inc<WGS == 2 ? 240 : 160>();
        const int lane = threadIdx.x % 32, t = lane % 4;
        const bool leader = threadIdx.x % 128 == 0;
        float s[1][N / 8][4], o[DP / 8][4] = {}, mx[2] = {-INF, -INF}, l[2], alpha[2];
        u32 pa[N / 16][4];
        auto mask = [&](int j) {
            if ((j + 1) * N > p.nk)
                #pragma unroll
                for (int n = 0; n < N / 8; n++)
                    #pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (j * N + n * 8 + t * 2 + i % 2 >= p.nk) s[0][n][i] = -INF;
        };
        auto pack_p = [&] {
            #pragma unroll
            for (int n = 0; n < N / 16; n++)
                #pragma unroll
                for (int i = 0; i < 4; i++)
                    pa[n][i] = pack<T>(s[0][2 * n + i / 2][i % 2 * 2], s[0][2 * n + i / 2][i % 2 * 2 + 1]);
        };
        mbar_wait(qfull, 0);
        mbar_wait(kfull, 0);
        wgmma_fence();
        scores(s[0], sq + wg * 64 * 32, sk);
        wgmma_wait<0>();
        if (leader) mbar_arrive(kfree);
        mask(0);
        A::template softmax<true, POLY>(s, mx, l, alpha, p.scale_log2);
        pack_p();
        for (int j = 1; j < tiles; j++) {
            const int st = j % STAGES, before = (j - 1) % STAGES;
            mbar_wait(kfull + 8 * st, j / STAGES & 1);
            wgmma_fence();
            scores(s[0], sq + wg * 64 * 32, sk + st * KBYTES);
            mbar_wait(vfull + 8 * before, (j - 1) / STAGES & 1);
            accumulate(o, pa, sv + before * KBYTES);
            wgmma_wait<1>();  // the scores are there, P V is still running
            if (leader) mbar_arrive(kfree + 8 * st);
            mask(j);
            A::template softmax<false, POLY>(s, mx, l, alpha, p.scale_log2);
            wgmma_wait<0>();
            if (leader) mbar_arrive(vfree + 8 * before);
            #pragma unroll
            for (int c = 0; c < DP / 8; c++)
                #pragma unroll
                for (int i = 0; i < 4; i++) o[c][i] *= alpha[i / 2];
            pack_p();
        }
        mbar_wait(vfull + 8 * ((tiles - 1) % STAGES), (tiles - 1) / STAGES & 1);
        wgmma_fence();
        accumulate(o, pa, sv + (tiles - 1) % STAGES * KBYTES);
        wgmma_wait<0>();
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            l[i] += shfl_xor(l[i], 1);
            l[i] += shfl_xor(l[i], 2);
            const int row = blockIdx.x * BLOCK + threadIdx.x / 32 * 16 + lane / 4 + 8 * i;
            if (row < p.nq) {
                u16* out = p.o.at(batch, head) + row * p.o.token;
                #pragma unroll
                for (int c = 0; c < D / 8; c++)
                    *(u32*)(out + c * 8 + t * 2) = pack<T>(o[c][2 * i] / l[i], o[c][2 * i + 1] / l[i]);
                if (p.lse && t == 0)
                    p.lse[((long long)batch * gridDim.y + head) * p.nq + row] = mx[i] * p.scale_log2 + log2f(l[i]);
            }
        }
    }
};

template <class T, int D, int N, int WGS, int STAGES>
__global__ void __launch_bounds__(128 * (WGS + 1), 1) forward_sm90(const __grid_constant__ Sm90Params m) {
    SHARED_MEMORY(unsigned char, raw, 128);
    AttentionSm90<T, D, N, WGS, STAGES>::template forward<0>(m, raw);
}
