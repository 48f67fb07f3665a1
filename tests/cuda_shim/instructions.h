// The names of device.cuh and of the Hopper instructions, as the kernels call them: each leaves its operands in the
// lane and waits for the scheduler to act on the whole warp.
#pragma once
template <class T> constexpr bool is_bf16 = false;
template <> constexpr bool is_bf16<Bf16> = true;
static inline shim::Lane& me() { return shim::lanes[shim::cur]; }

static inline void __syncthreads() {
    me().n = 0;
    shim::wait(shim::SYNC);
}
template <int N, bool TRANS> static inline void ldmatrix(u32 (&r)[4], const u16* row) {
    me().addr = row, me().reg = r, me().n = N;
    shim::wait(TRANS ? shim::LDM_T : shim::LDM);
}
template <class T> static inline void mma_k16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    memcpy(me().a, a, 16);
    me().b[0] = b0, me().b[1] = b1, me().c = c, me().bf16 = is_bf16<T>, me().n = 0;
    shim::wait(shim::MMA16);
}
template <class T> static inline void mma_k8(float (&c)[4], u32 a0, u32 a1, u32 b0) {
    me().a[0] = a0, me().a[1] = a1, me().b[0] = b0, me().c = c, me().bf16 = is_bf16<T>, me().n = 0;
    shim::wait(shim::MMA8);
}
static inline float shfl_xor(float x, int mask) {
    me().x = x, me().mask = mask, me().n = 0;
    shim::wait(shim::SHFL);
    return me().x;
}
static inline void cp_async16(u16* dst, const u16* src, bool valid) {
    shim::check_shared(dst, 16);
    if ((uintptr_t)src & 15) shim::fail("global address of cp.async not 16-byte aligned");
    memset(dst, 0xff, 16);  // in flight: who reads before the wait sees NaN
    me().groups.back().push_back({dst, src, valid});
    shim::stats.copies++;
}
static inline void cp_async_commit() { me().groups.emplace_back(); }
template <int N> static inline void cp_async_wait() {
    auto& groups = me().groups;
    while ((int)groups.size() - 1 > N) {
        for (auto& c : groups.front())
            if (c.valid) memcpy(c.dst, c.src, 16);
            else memset(c.dst, 0, 16);
        groups.erase(groups.begin());
    }
}
static inline float ex2(float x) {
    shim::stats.ex2++;
    const float y = std::exp2f(x);
    return y < 1.17549435e-38f ? 0.f : y;
}
template <class T> static inline u32 pack(float lo, float hi) {
    const auto round = [](float x) -> u32 { return is_bf16<T> ? shim::to_bf16(x) : shim::to_f16(x); };
    return round(lo) | round(hi) << 16;
}
template <class T> static inline void unpack(u32 x, float& lo, float& hi) {
    lo = is_bf16<T> ? shim::bf16(x & 0xffff) : shim::f16(x & 0xffff);
    hi = is_bf16<T> ? shim::bf16(x >> 16) : shim::f16(x >> 16);
}
static inline float __int_as_float(int i) {
    float f;
    memcpy(&f, &i, 4);
    return f;
}
static inline int __float_as_int(float f) {
    int i;
    memcpy(&i, &f, 4);
    return i;
}

// ---- Hopper ----
static inline u32 smem_ptr(const void* p) { return (u32)((const char*)p - (const char*)shim::smem_base()); }
static inline void mbar_init(u32 bar, int count) { shim::mbar(bar) = {count, count, 0, 0}; }
static inline void mbar_fence_init() {}
static inline void mbar_expect(u32 bar, int bytes) {
    auto& m = shim::mbar(bar);
    m.tx += bytes, m.pending--;
    shim::mbar_check(m);
}
static inline void mbar_arrive(u32 bar) {
    auto& m = shim::mbar(bar);
    m.pending--;
    shim::mbar_check(m);
    shim::wait(shim::YIELD);
}
static inline void mbar_wait(u32 bar, int parity) {
    me().bar = bar, me().parity = parity, me().n = 0;
    shim::wait(shim::MBAR);
}
static inline void tma_load(u32 dst, const TensorMap& map, int d, int token, int head, int batch, u32 bar) {
    if (dst % 128) shim::fail("TMA destination not 128-byte aligned");
    if (dst + map.rows * 32 > shim::smem_bytes) shim::fail("TMA destination out of bounds");
    for (int i = 0; i < map.rows * 16; i++) shim::smem_base()[dst / 2 + i] = 0xffff;
    shim::tmas.push_back({dst, &map, d, token, head, batch, bar});
}
template <int N> static inline void setmaxnreg_inc() {}
template <int N> static inline void setmaxnreg_dec() {}
static inline void wgmma_fence() {}
static inline void wgmma_commit() {
    me().n = 0;
    shim::wait(shim::WGMMA_COMMIT);
}
template <int N> static inline void wgmma_wait() {
    me().n = N;
    shim::wait(shim::WGMMA_WAIT);
}
template <class T, int N> static inline void wgmma_ss(float (&c)[N / 8][4], u64 a, u64 b, bool add) {
    me().n = N, me().c = &c[0][0], me().desc_a = a, me().desc_b = b, me().add = add, me().from_regs = false;
    me().bf16 = is_bf16<T>;
    shim::wait(shim::WGMMA);
}
template <class T, int N> static inline void wgmma_rs(float (&c)[N / 8][4], const u32 (&a)[4], u64 b) {
    memcpy(me().a, a, 16);
    me().n = N, me().c = &c[0][0], me().desc_a = 0, me().desc_b = b, me().add = true, me().from_regs = true;
    me().bf16 = is_bf16<T>;
    shim::wait(shim::WGMMA);
}
