// softmax(scale * Q K^T) V and its gradients in one pass over tiles in shared memory (Dao 2023, FlashAttention-2), for
// sm_80 and newer. fp16 or bf16 in and out, fp32 scores and sums, no atomics: the same input gives the same bits.
//
// All three kernels have one shape. A block owns WARPS * R * 16 rows of one head, each warp R * 16 of them as A
// operands of the tensor cores (R = 2 halves the reads of shared memory per product), and walks over tiles of N rows of
// the other side, which cp.async copies two at a time while the tile before is worked on:
//   forward       rows Q        tiles K, V      S = Q K^T                     O  += P V
//   backward_dq   rows Q, dO    tiles K, V      S = Q K^T, dP = dO V^T        dQ += dS K
//   backward_dkv  rows K, V     tiles Q, dO     S^T = K Q^T, dP^T = V dO^T    dV += P^T dO, dK += dS^T Q
// with P = exp(S - log-sum-exp) and dS = P (dP - delta), delta = rowsum(dO O). Head widths are exact multiples of 8 and
// nothing is padded: d = 40 is two steps of 16 and one of 8.
//
// Fragments, with g = lane / 4 and t = lane % 4 (PTX ISA, mma.m16n8k16): a 16x8 fp32 accumulator c holds the columns
// 2t, 2t + 1 of row g (c[0], c[1]) and of row g + 8 (c[2], c[3]); two neighbouring accumulators, packed to 16 bits, are
// exactly the A operand of the next product, so P never leaves the registers.
#pragma once
#include "device.cuh"

struct View {  // a tensor [batch, tokens, heads, d]; strides in elements, that of d is 1
    u16* data;
    long long batch, token, head;
    DEV u16* at(int b, int h) const { return data + b * batch + h * head; }
};
struct Params {
    View q, k, v, o, dout, dq, dk, dv;
    float *lse, *delta;       // [batch, heads, nq]: log2 of the sum of exp2 of the scores (may be null); rowsum(dO * O)
    int nq, nk;
    float scale, scale_log2;  // the softmax's scale, and the same times log2(e)
};

// 2^x for x <= 0 on the FMA units (Cody-Waite, degree 3, relative error 8e-5), to relieve the 16 exponentials a clock.
DEV float ex2_poly(float x) {
    x = fmaxf(x, -126.f);
    const float r = x + 12582912.f;  // 1.5 * 2^23: the integer part lands in the low bits
    const float f = x - (r - 12582912.f);
    const float p = fmaf(fmaf(fmaf(0.05508873f, f, 0.24260435f), f, 0.69327626f), f, 0.99992892f);
    return __int_as_float(__float_as_int(p) + (__float_as_int(r) << 23));
}

template <bool B, class X, class Y> struct Select { typedef X type; };
template <class X, class Y> struct Select<false, X, Y> { typedef Y type; };

template <class T, int D, int N, int WARPS, int R> struct Attention {
    static constexpr int C = D / 8;         // chunks of 16 bytes in a row
    static constexpr int LD = (C | 1) * 8;  // stride of shared rows: an odd number of chunks, so no bank conflicts
    static constexpr int TILE = N * LD, THREADS = 32 * WARPS, BLOCK = 16 * R * WARPS;
    static constexpr int COPIES = (N * C + THREADS - 1) / THREADS;
    static constexpr bool WIDE = D > 80;  // rows and sums of some kernels together do not fit 255 registers
    static_assert(D % 8 == 0 && N % 16 == 0, "");
    typedef float Scores[R][N / 8][4];  // R * 16 rows x N rows of a tile
    typedef float Acc[R][C][4];         // R * 16 rows x D

    static DEV int first_row() {  // of c[0]; the lane's other rows follow 8 apart
        return (blockIdx.x * WARPS + threadIdx.x / 32) * 16 * R + threadIdx.x % 32 / 4;
    }
    // The block's rows as A operands: chunks c and c + 1 (k16) or chunk c alone (k8, the first two registers).
    struct RegisterRows {
        u32 reg[R][2 * C];  // [2c] row g, [2c + 1] row g + 8, columns 8c + 2t and the next
        DEV void load(u16*, const u16* base, long long stride, int n) {
            #pragma unroll
            for (int i = 0; i < 2 * R; i++) {
                const int row = first_row() + 8 * i;
                #pragma unroll
                for (int c = 0; c < C; c++)
                    reg[i / 2][2 * c + i % 2] =
                        row < n ? *(const u32*)(base + row * stride + c * 8 + threadIdx.x % 4 * 2) : 0;
            }
        }
        template <int K> DEV void fragment(u32 (&a)[4], int r, int c) const {
            #pragma unroll
            for (int i = 0; i < K / 4; i++) a[i] = reg[r][2 * c + i];
        }
    };
    // The same from shared memory, where WIDE.
    struct SharedRows {
        const u16* rows;
        DEV void load(u16* smem, const u16* base, long long stride, int n) {
            const int first = blockIdx.x * BLOCK;
            for (int chunk = threadIdx.x; chunk < BLOCK * C; chunk += THREADS) {
                const int row = chunk / C;
                const bool valid = first + row < n;
                const u16* from = base + (valid ? first + row : 0) * stride + chunk % C * 8;
                cp_async16(smem + row * LD + chunk % C * 8, from, valid);
            }
            rows = smem + (threadIdx.x / 32 * 16 * R + threadIdx.x % 16) * LD;  // complete when the first tile is
        }
        template <int K> DEV void fragment(u32 (&a)[4], int r, int c) const {
            const u16* row = rows + r * 16 * LD + c * 8;
            if (K == 16) ldmatrix<4, false>(a, row + threadIdx.x % 32 / 16 * 8);
            else ldmatrix<2, false>(a, row);
        }
    };
    static DEV void store_rows(u16* base, long long stride, int n, const Acc& x, const float (&factor)[2 * R]) {
        #pragma unroll
        for (int i = 0; i < 2 * R; i++) {
            const int row = first_row() + 8 * i;
            if (row < n)
                #pragma unroll
                for (int c = 0; c < C; c++)
                    *(u32*)(base + row * stride + c * 8 + threadIdx.x % 4 * 2) =
                        pack<T>(x[i / 2][c][i % 2 * 2] * factor[i], x[i / 2][c][i % 2 * 2 + 1] * factor[i]);
        }
    }
    // s = rows * tile^T
    template <class Rows> static DEV void scores(Scores& s, const Rows& rows, const u16* tile) {
        const int lane = threadIdx.x % 32;
        #pragma unroll
        for (int i = 0; i < R * N / 2; i++) s[i / (N / 2)][i / 4 % (N / 8)][i % 4] = 0.f;
        #pragma unroll
        for (int c = 0; c < C; c += 4) {  // 32 columns at a time, then the remaining 16 or 8
            u32 a[R][2][4];
            #pragma unroll
            for (int r = 0; r < R; r++) {
                if (c + 2 <= C) rows.template fragment<16>(a[r][0], r, c);
                else rows.template fragment<8>(a[r][0], r, c);
                if (c + 4 <= C) rows.template fragment<16>(a[r][1], r, c + 2);
            }
            #pragma unroll
            for (int n = 0; n < N / 8; n++) {
                const u16* row = tile + (n * 8 + lane % 8) * LD + c * 8;
                u32 b[4];
                if (c + 4 <= C) ldmatrix<4, false>(b, row + lane / 8 * 8);
                else if (c + 2 <= C) ldmatrix<2, false>(b, row + lane / 8 % 2 * 8);
                else ldmatrix<1, false>(b, row);
                #pragma unroll
                for (int r = 0; r < R; r++) {
                    if (c + 2 <= C) mma_k16<T>(s[r][n], a[r][0], b[0], b[1]);
                    else mma_k8<T>(s[r][n], a[r][0][0], a[r][0][1], b[0]);
                    if (c + 4 <= C) mma_k16<T>(s[r][n], a[r][1], b[2], b[3]);
                }
            }
        }
    }
    // o += s * tile
    static DEV void accumulate(Acc& o, const Scores& s, const u16* tile) {
        const int lane = threadIdx.x % 32;
        #pragma unroll
        for (int n = 0; n < N / 8; n += 2) {  // 16 rows of the tile at a time
            u32 a[R][4];
            #pragma unroll
            for (int r = 0; r < R; r++)
                #pragma unroll
                for (int i = 0; i < 4; i++)
                    a[r][i] = pack<T>(s[r][n + i / 2][i % 2 * 2], s[r][n + i / 2][i % 2 * 2 + 1]);
            const u16* row = tile + (n * 8 + lane % 16) * LD;
            #pragma unroll
            for (int c = 0; c < C; c += 2) {
                u32 b[4];
                if (c + 2 <= C) ldmatrix<4, true>(b, row + (c + lane / 16) * 8);
                else ldmatrix<2, true>(b, row + c * 8);
                #pragma unroll
                for (int r = 0; r < R; r++) {
                    mma_k16<T>(o[r][c], a[r], b[0], b[1]);
                    if (c + 2 <= C) mma_k16<T>(o[r][c + 1], a[r], b[2], b[3]);
                }
            }
        }
    }
    // Walks over the tiles of x and y, n rows each: body(first row, tile of x, tile of y), both in shared memory, where
    // each takes BUFFERS tiles: two, or one where a single tile holds all n rows.
    template <int BUFFERS = 2, class Body>
    static DEV void for_tiles(u16* smem, const u16* x, long long xs, const u16* y, long long ys, int n, Body body) {
        int row[COPIES], to[COPIES], xfrom[COPIES], yfrom[COPIES];  // this thread's chunks of a tile
        #pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const int chunk = threadIdx.x + i * THREADS;
            row[i] = chunk / C;
            to[i] = row[i] * LD + chunk % C * 8;
            xfrom[i] = row[i] * (int)xs + chunk % C * 8;
            yfrom[i] = row[i] * (int)ys + chunk % C * 8;
        }
        auto load = [&](int j) {
            const int n0 = j * N, left = n - n0;
            #pragma unroll
            for (int i = 0; i < COPIES; i++)
                if (COPIES * THREADS == N * C || row[i] < N) {
                    cp_async16(smem + j % BUFFERS * TILE + to[i], x + n0 * xs + xfrom[i], row[i] < left);
                    cp_async16(smem + (BUFFERS + j % BUFFERS) * TILE + to[i], y + n0 * ys + yfrom[i], row[i] < left);
                }
            cp_async_commit();
        };
        load(0);
        for (int j = 0; j * N < n; j++) {
            cp_async_wait<0>();
            __syncthreads();  // tile j has arrived and every warp has left the other buffer
            if ((j + 1) * N < n) load(j + 1);
            body(j * N, smem + j % BUFFERS * TILE, smem + (BUFFERS + j % BUFFERS) * TILE);
        }
    }

    // One step of the online softmax: s becomes exp2(s * scale - running maximum m), the sums l grow by it, and alpha
    // is what older sums must be multiplied by.
    template <bool FIRST, int POLY>
    static DEV void softmax(Scores& s, float (&m)[2 * R], float (&l)[2 * R], float (&alpha)[2 * R], float scale_log2) {
        #pragma unroll
        for (int i = 0; i < 2 * R; i++) {
            const int r = i / 2, e = i % 2 * 2;
            float mx = m[i], sum = 0.f;
            #pragma unroll
            for (int n = 0; n < N / 8; n++) mx = fmaxf(mx, fmaxf(s[r][n][e], s[r][n][e + 1]));
            mx = fmaxf(mx, shfl_xor(mx, 1));
            mx = fmaxf(mx, shfl_xor(mx, 2));
            const float bias = mx * scale_log2;
            alpha[i] = FIRST ? 0.f : ex2(m[i] * scale_log2 - bias);
            m[i] = mx;
            #pragma unroll
            for (int n = 0; n < N / 8; n++)
                #pragma unroll
                for (int k = 0; k < 2; k++) {
                    const float x = fmaf(s[r][n][e + k], scale_log2, -bias);
                    const bool poly = POLY > 0 && (n * 2 + k) % (POLY + !POLY) == POLY - 1;
                    sum += s[r][n][e + k] = poly ? ex2_poly(x) : ex2(x);
                }
            l[i] = FIRST ? sum : l[i] * alpha[i] + sum;
        }
    }

    template <bool ONE_TILE, int POLY> static DEV void forward(const Params& p, u16* smem) {
        const int t = threadIdx.x % 4, head = blockIdx.y, batch = blockIdx.z;
        typename Select<WIDE && ONE_TILE, SharedRows, RegisterRows>::type q;
        q.load(smem + 2 * TILE, p.q.at(batch, head), p.q.token, p.nq);
        Acc o = {};
        float m[2 * R], l[2 * R], alpha[2 * R];
        #pragma unroll
        for (int i = 0; i < 2 * R; i++) m[i] = -INF, l[i] = 0.f;
        auto body = [&](int k0, const u16* k, const u16* v) {
            Scores s;
            scores(s, q, k);
            if (k0 + N > p.nk)  // keys past the end
                #pragma unroll
                for (int n = 0; n < N / 8; n++)
                    #pragma unroll
                    for (int i = 0; i < 4 * R; i++)
                        if (k0 + n * 8 + t * 2 + i % 2 >= p.nk) s[i / 4][n][i % 4] = -INF;
            softmax<ONE_TILE, POLY>(s, m, l, alpha, p.scale_log2);
            if (!ONE_TILE)
                #pragma unroll
                for (int c = 0; c < C; c++)
                    #pragma unroll
                    for (int i = 0; i < 4 * R; i++) o[i / 4][c][i % 4] *= alpha[i / 2];
            accumulate(o, s, v);
        };
        for_tiles<ONE_TILE ? 1 : 2>(smem, p.k.at(batch, head), p.k.token, p.v.at(batch, head), p.v.token, p.nk, body);
        float inverse[2 * R];
        #pragma unroll
        for (int i = 0; i < 2 * R; i++) {
            l[i] += shfl_xor(l[i], 1);
            l[i] += shfl_xor(l[i], 2);
            inverse[i] = 1.f / l[i];
            const int row = first_row() + 8 * i;
            if (p.lse && t == 0 && row < p.nq)
                p.lse[((long long)batch * gridDim.y + head) * p.nq + row] = m[i] * p.scale_log2 + log2f(l[i]);
        }
        store_rows(p.o.at(batch, head), p.o.token, p.nq, o, inverse);
    }

    // Also writes delta, which backward_dkv reads: launch it first.
    static DEV void backward_dq(const Params& p, u16* smem) {
        const int t = threadIdx.x % 4, head = blockIdx.y, batch = blockIdx.z;
        const long long stats = ((long long)batch * gridDim.y + head) * p.nq;
        RegisterRows q, dout, o;
        q.load(smem, p.q.at(batch, head), p.q.token, p.nq);
        dout.load(smem, p.dout.at(batch, head), p.dout.token, p.nq);
        o.load(smem, p.o.at(batch, head), p.o.token, p.nq);
        float lse[2 * R], delta[2 * R], scale[2 * R];
        #pragma unroll
        for (int i = 0; i < 2 * R; i++) {
            const int row = first_row() + 8 * i;
            delta[i] = 0.f;
            #pragma unroll
            for (int c = 0; c < C; c++) {
                float x[2], y[2];
                unpack<T>(dout.reg[i / 2][2 * c + i % 2], x[0], x[1]);
                unpack<T>(o.reg[i / 2][2 * c + i % 2], y[0], y[1]);
                delta[i] = fmaf(x[0], y[0], fmaf(x[1], y[1], delta[i]));
            }
            delta[i] += shfl_xor(delta[i], 1);
            delta[i] += shfl_xor(delta[i], 2);
            if (t == 0 && row < p.nq) p.delta[stats + row] = delta[i];
            lse[i] = row < p.nq ? p.lse[stats + row] : INF;
            scale[i] = p.scale;
        }
        Acc dq = {};
        auto body = [&](int k0, const u16* k, const u16* v) {
            Scores s, dp;
            scores(s, q, k);
            scores(dp, dout, v);
            #pragma unroll
            for (int n = 0; n < N / 8; n++)
                #pragma unroll
                for (int i = 0; i < 4 * R; i++) {
                    const float x = ex2(fmaf(s[i / 4][n][i % 4], p.scale_log2, -lse[i / 2]));
                    const bool valid = k0 + n * 8 + t * 2 + i % 2 < p.nk;
                    s[i / 4][n][i % 4] = valid ? x * (dp[i / 4][n][i % 4] - delta[i / 2]) : 0.f;
                }
            accumulate(dq, s, k);
        };
        for_tiles(smem, p.k.at(batch, head), p.k.token, p.v.at(batch, head), p.v.token, p.nk, body);
        store_rows(p.dq.at(batch, head), p.dq.token, p.nq, dq, scale);
    }

    static DEV void backward_dkv(const Params& p, u16* smem) {
        const int t = threadIdx.x % 4, head = blockIdx.y, batch = blockIdx.z;
        const long long stats = ((long long)batch * gridDim.y + head) * p.nq;
        typename Select<WIDE, SharedRows, RegisterRows>::type k, v;
        k.load(smem + 4 * TILE, p.k.at(batch, head), p.k.token, p.nk);
        v.load(smem + 4 * TILE + BLOCK * LD, p.v.at(batch, head), p.v.token, p.nk);
        float scale[2 * R], one[2 * R];
        #pragma unroll
        for (int i = 0; i < 2 * R; i++) scale[i] = p.scale, one[i] = 1.f;
        Acc dk = {}, dv = {};
        auto body = [&](int q0, const u16* q, const u16* dout) {
            Scores s, dp;
            scores(s, k, q);
            scores(dp, v, dout);
            #pragma unroll
            for (int n = 0; n < N / 8; n++)
                #pragma unroll
                for (int j = 0; j < 2; j++) {
                    const int row = q0 + n * 8 + t * 2 + j;
                    const float lse = row < p.nq ? p.lse[stats + row] : INF;
                    const float delta = row < p.nq ? p.delta[stats + row] : 0.f;
                    #pragma unroll
                    for (int i = j; i < 4 * R; i += 2) {
                        const float x = ex2(fmaf(s[i / 4][n][i % 4], p.scale_log2, -lse));
                        s[i / 4][n][i % 4] = x;
                        dp[i / 4][n][i % 4] = x * (dp[i / 4][n][i % 4] - delta);
                    }
                }
            accumulate(dv, s, dout);
            accumulate(dk, dp, q);
        };
        for_tiles(smem, p.q.at(batch, head), p.q.token, p.dout.at(batch, head), p.dout.token, p.nq, body);
        store_rows(p.dk.at(batch, head), p.dk.token, p.nk, dk, scale);
        store_rows(p.dv.at(batch, head), p.dv.token, p.nk, dv, one);
    }
};

template <class T, int D, int N, int WARPS, int R, bool ONE_TILE, int POLY>
__global__ void __launch_bounds__(32 * WARPS) forward(const Params p) {
    SHARED_MEMORY(u16, smem, 16);
    Attention<T, D, N, WARPS, R>::template forward<ONE_TILE, POLY>(p, smem);
}
template <class T, int D, int N, int WARPS, int R>
__global__ void __launch_bounds__(32 * WARPS) backward_dq(const Params p) {
    SHARED_MEMORY(u16, smem, 16);
    Attention<T, D, N, WARPS, R>::backward_dq(p, smem);
}
template <class T, int D, int N, int WARPS, int R>
__global__ void __launch_bounds__(32 * WARPS) backward_dkv(const Params p) {
    SHARED_MEMORY(u16, smem, 16);
    Attention<T, D, N, WARPS, R>::backward_dkv(p, smem);
}
