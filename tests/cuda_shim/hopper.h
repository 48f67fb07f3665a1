// mbarriers, TMA loads and wgmma of sm_90a, all in the 32-byte swizzle that the kernels use.
#pragma once
#include "state.h"

struct TensorMap {  // strides in elements; a box is 16 columns x `rows` tokens
    const u16* base;
    long long batch, token, head;
    int d, tokens, rows;
};

namespace shim {
struct Mbar {
    int expected = 0, pending = 0, tx = 0, phase = 0;
};
struct Tma {
    u32 dst;
    const TensorMap* map;
    int d, token, head, batch;
    u32 bar;
};
struct Job {
    int N;
    bool from_regs, add, bf16;
    u64 desc_a, desc_b;
    float* c[32];
    u32 a[32][4];
};
// One warp's quarter of its warpgroup's wgmmas. A group runs when some warp waits for it and all four have committed
// it; its sums live in `shadow` and reach the warp's registers, NaN until then, at that warp's own wait.
struct Stream {
    std::vector<std::vector<Job>> groups{1};  // the last one is open
    int ran = 0, retired = 0;
    std::map<float*, std::vector<float>> shadow;  // by lane 0's accumulator
    int committed() const { return (int)groups.size() - 1; }
};
static std::vector<Mbar> mbars;  // by shared address / 8
static std::vector<Tma> tmas;    // in flight
static std::vector<Stream> streams;

static Mbar& mbar(u32 a) {
    if (a % 8 || a / 8 >= mbars.size()) fail("bad mbarrier address");
    return mbars[a / 8];
}
static void mbar_check(Mbar& m) {
    if (m.pending < 0) fail("more arrivals on an mbarrier than its count");
    if (m.pending == 0 && m.tx == 0) m.phase ^= 1, m.pending = m.expected;
}
static u16& shared16(u32 a) {
    a ^= (a >> 7 & 1) << 4;  // the 32-byte swizzle
    if (a + 2 > smem_bytes) fail("shared address out of bounds");
    return smem_base()[a / 2];
}
static void finish_tma(size_t i) {
    const Tma t = tmas[i];
    const TensorMap& m = *t.map;
    tmas.erase(tmas.begin() + i);
    for (int r = 0; r < m.rows; r++)
        for (int e = 0; e < 16; e++) {
            const bool inside = t.d + e < m.d && t.token + r < m.tokens;
            const long long from = t.batch * m.batch + t.head * m.head + (t.token + r) * m.token + t.d + e;
            shared16(t.dst + r * 32 + e * 2) = inside ? m.base[from] : 0;
        }
    Mbar& b = mbar(t.bar);
    b.tx -= m.rows * 32;
    mbar_check(b);
    stats.tma++;
}
static float operand(u64 desc, int mn, int k, bool mn_major, bool is_bf16) {
    const u32 start = (desc & 0x3fff) << 4, leading = (desc >> 16 & 0x3fff) << 4, stride = (desc >> 32 & 0x3fff) << 4;
    if (desc >> 62 != 3) fail("only the 32-byte swizzle is emulated");
    if (start % 256) fail("wgmma operand does not start on its swizzle pattern's 256 bytes");
    const u32 offset = mn_major ? mn % 8 * 2 + mn / 8 % 2 * 16 + mn / 16 * leading + k % 8 * 32 + k / 8 * stride
                                : mn % 8 * 32 + mn / 8 * stride + k / 8 * 16 + k % 8 * 2;
    const u16 h = shared16(start + offset);
    return is_bf16 ? bf16(h) : f16(h);
}
static void do_job(const Job& j, int warp) {
    float* acc = streams[warp].shadow[j.c[0]].data();
    float A[16][16];
    std::vector<float> B(16 * j.N), D(j.N);
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) {
            const u32 r = j.a[i % 8 * 4 + k % 8 / 2][i / 8 + k / 8 * 2];
            const u16 x = k % 2 ? r >> 16 : r & 0xffff;
            A[i][k] = !j.from_regs ? operand(j.desc_a, warp % 4 * 16 + i, k, false, j.bf16) : j.bf16 ? bf16(x) : f16(x);
        }
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < j.N; n++) B[k * j.N + n] = operand(j.desc_b, n, k, j.from_regs, j.bf16);
    for (int i = 0; i < 16; i++) {
        std::fill(D.begin(), D.end(), 0.f);
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < j.N; n++) D[n] += A[i][k] * B[k * j.N + n];
        for (int n = 0; n < j.N; n++) {  // accumulator n / 8: rows g and g + 8, columns 2t and 2t + 1, as of mma.sync
            float& c = acc[(i % 8 * 4 + n % 8 / 2) * (j.N / 2) + n / 8 * 4 + i / 8 * 2 + n % 2];
            c = (j.add ? c : 0.f) + D[n];
        }
    }
    stats.wgmma++;
}
static void do_wgmma(Lane* w, int warp) {
    Job j = {w[0].n, w[0].from_regs, w[0].add, w[0].bf16, w[0].desc_a, w[0].desc_b, {}, {}};
    for (int l = 0; l < 32; l++) {
        if (w[l].desc_a != j.desc_a || w[l].desc_b != j.desc_b) fail("lanes disagree on a wgmma descriptor");
        j.c[l] = w[l].c;
        memcpy(j.a[l], w[l].a, 16);
    }
    Stream& s = streams[warp];
    if (!s.shadow.count(j.c[0]))
        for (int l = 0; l < 32; l++) {
            auto& v = s.shadow[j.c[0]];
            v.insert(v.end(), j.c[l], j.c[l] + j.N / 2);
            std::fill(j.c[l], j.c[l] + j.N / 2, NAN);
        }
    s.groups.back().push_back(j);
}
static bool wgmma_ready(int warp, int keep) {  // has the whole warpgroup committed what this warp waits for?
    const int target = streams[warp].committed() - keep;
    for (int w = warp / 4 * 4; w < warp / 4 * 4 + 4; w++)
        if (streams[w].committed() < target) return false;
    return true;
}
static void wgmma_run(int warp, int keep) {
    const int target = streams[warp].committed() - keep;
    for (int w = warp / 4 * 4; w < warp / 4 * 4 + 4; w++)
        for (; streams[w].ran < target; streams[w].ran++)
            for (auto& j : streams[w].groups[streams[w].ran]) do_job(j, w);
}
static void wgmma_retire(int warp, int keep) {
    wgmma_run(warp, keep);
    Stream& s = streams[warp];
    const int target = s.committed() - keep;
    for (; s.retired < target; s.retired++)
        for (auto& j : s.groups[s.retired]) {
            bool later = false;
            for (int g = target; g < (int)s.groups.size(); g++)
                for (auto& q : s.groups[g]) later |= q.c[0] == j.c[0];
            auto it = s.shadow.find(j.c[0]);
            if (later || it == s.shadow.end()) continue;
            for (int l = 0; l < 32; l++) memcpy(j.c[l], &it->second[l * (j.N / 2)], j.N / 2 * sizeof(float));
            s.shadow.erase(it);
        }
}
}  // namespace shim
