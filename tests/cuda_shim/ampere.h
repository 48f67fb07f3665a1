// The warp-collective instructions of sm_80, on the registers of all 32 lanes at once (PTX ISA's fragment layouts).
#pragma once
#include "state.h"

namespace shim {
// Extra cycles of shared memory for 8 rows of 16 bytes read in one phase.
static int conflicts(const u16* const* rows) {
    int use[8] = {}, worst = 0;
    for (int i = 0; i < 8; i++) {
        bool twice = false;
        for (int j = 0; j < i; j++) twice |= rows[j] == rows[i];
        if (!twice) worst = std::max(worst, ++use[((const char*)rows[i] - (const char*)smem_base()) / 16 % 8]);
    }
    return worst - 1;
}
static void do_ldmatrix(Lane* w, bool trans) {
    for (int j = 0; j < w[0].n; j++) {
        const u16* rows[8];
        for (int i = 0; i < 8; i++) {
            rows[i] = w[j * 8 + i].addr;
            check_shared(rows[i], 16);
        }
        stats.conflicts += conflicts(rows);
        for (int l = 0; l < 32; l++) {
            const int g = l / 4, t = l % 4;
            const u16 lo = trans ? rows[2 * t][g] : rows[g][2 * t];
            const u16 hi = trans ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
            w[l].reg[j] = lo | (u32)hi << 16;
        }
    }
    stats.ldmatrix++;
}
static void do_mma(Lane* w, int K) {
    float A[16][16], B[16][8], D[16][8] = {};
    auto half = [&](u32 r, int hi) {
        const u16 h = hi ? r >> 16 : r & 0xffff;
        return w[0].bf16 ? bf16(h) : f16(h);
    };
    for (int l = 0; l < 32; l++) {
        const int g = l / 4, t = l % 4;
        for (int h = 0; h < 2; h++) {
            for (int i = 0; i < K / 4; i++) A[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + h] = half(w[l].a[i], h);
            for (int i = 0; i < K / 8; i++) B[2 * t + 8 * i + h][g] = half(w[l].b[i], h);
        }
    }
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < K; k++)
            for (int n = 0; n < 8; n++) D[m][n] += A[m][k] * B[k][n];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) w[l].c[i] += D[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
    (K == 16 ? stats.mma16 : stats.mma8)++;
}
static void do_shfl(Lane* w) {
    float x[32];
    for (int l = 0; l < 32; l++) x[l] = w[l].x;
    for (int l = 0; l < 32; l++) w[l].x = x[l ^ w[l].mask];
    stats.shfl++;
}
}  // namespace shim
