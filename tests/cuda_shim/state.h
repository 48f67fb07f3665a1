// What the shim knows: every CUDA thread is a fiber with its pending instruction, and the block's shared memory.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <vector>

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace shim {
enum Op { NONE, LDM, LDM_T, MMA16, MMA8, SHFL, WGMMA, WGMMA_COMMIT, WGMMA_WAIT, MBAR, YIELD, SYNC, DONE };
struct Copy {
    u16* dst;
    const u16* src;
    bool valid;
};
struct Lane {
    void* sp = nullptr;
    std::vector<char> stack;
    Op op = NONE;  // the collective instruction this thread waits at, and its operands:
    int n = 0;
    const u16* addr = nullptr;
    u32* reg = nullptr;
    float* c = nullptr;
    u32 a[4], b[2];
    bool bf16 = false;
    float x = 0;
    int mask = 0;
    u64 desc_a = 0, desc_b = 0;  // wgmma
    bool from_regs = false, add = false;
    u32 bar = 0;  // mbarrier
    int parity = 0;
    std::vector<std::vector<Copy>> groups{1};  // of cp.async, the last one open
};
struct Stats {
    long mma16 = 0, mma8 = 0, ldmatrix = 0, conflicts = 0, ex2 = 0, barriers = 0, copies = 0, shfl = 0;
    long wgmma = 0, tma = 0;
};
static Stats stats;
static std::vector<Lane> lanes;
static int cur = 0;
static dim3 blockIdx, blockDim, gridDim, threadIdx;
static std::vector<u16> smem;
static size_t smem_bytes;  // what the launch asked for: an access beyond it fails
static std::function<void()> body;
static void* main_sp;
static std::mt19937 rng;
static unsigned schedule;

static u16* smem_base() { return (u16*)(((uintptr_t)smem.data() + 1023) & ~1023ull); }

[[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "cuda_shim: %s (block %u,%u,%u thread %d)\n", what, blockIdx.x, blockIdx.y, blockIdx.z, cur);
    abort();
}
static void check_shared(const u16* p, int bytes) {
    if (p < smem_base() || (const char*)p + bytes > (const char*)smem_base() + smem_bytes)
        fail("shared address out of bounds");
    if ((uintptr_t)p & 15) fail("shared address not 16-byte aligned");
}

// Switching fibers: the callee-saved registers of the x86-64 System V ABI go on the old stack and come off the new.
#ifndef __x86_64__
#error "the shim's fibers are written for x86-64"
#endif
extern "C" void shim_switch(void** save, void* load);
asm(R"(
.text
.globl shim_switch
shim_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");
static void yield_to_scheduler() { shim_switch(&lanes[cur].sp, main_sp); }
static void entry() {
    body();
    lanes[cur].op = DONE;
    yield_to_scheduler();
    abort();
}
static void start(Lane& lane) {
    lane.stack.resize(64 * 1024);
    lane.op = NONE;
    lane.n = 0;
    lane.groups.assign(1, {});
    void** sp = (void**)(((uintptr_t)lane.stack.data() + lane.stack.size()) & ~15ull);
    *--sp = nullptr;
    *--sp = (void*)entry;  // ret lands in entry with the ABI's alignment
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    lane.sp = sp;
}
static void resume(int i) {
    cur = i;
    threadIdx.x = i;
    lanes[i].op = NONE;
    shim_switch(&main_sp, lanes[i].sp);
}
static void wait(Op op) {
    lanes[cur].op = op;
    yield_to_scheduler();
}

static float f16(u16 h) {
    _Float16 x;
    memcpy(&x, &h, 2);
    return (float)x;
}
static float bf16(u16 h) {
    u32 u = (u32)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static u16 to_f16(float f) {
    _Float16 x = (_Float16)f;
    u16 h;
    memcpy(&h, &x, 2);
    return h;
}
static u16 to_bf16(float f) {
    u32 u;
    memcpy(&u, &f, 4);
    return f != f ? 0x7fff : (u16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
}  // namespace shim
