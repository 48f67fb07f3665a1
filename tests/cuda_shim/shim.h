// CUDA on one CPU core, just enough of it to execute the attention kernels exactly as they are written.
//
// Every CUDA thread is a fiber. Warp-collective instructions wait until all 32 lanes arrive with the same one, then act
// on all lanes' registers; __syncthreads waits for the block. Warps run ahead of each other in an order drawn from
// `schedule`, so a missing barrier shows as another result. Checked on the way: alignment and bounds of shared
// addresses, collectives met by all lanes, deadlock; shared memory holds NaN until it is written, and so does what a
// copy in flight or an unfinished wgmma will write. Bank conflicts are counted.
#pragma once
#include "ampere.h"
#include "hopper.h"
#define DEV inline
#define __global__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define INF std::numeric_limits<float>::infinity()
// As unaligned as the declaration allows, where the kernel rounds up itself.
#define SHARED_MEMORY(type, name, alignment) type* name = (type*)shim::smem_base() + (alignment > 16 ? alignment : 0)
using std::fmaf;
using std::log2f;

namespace shim {
// Runs warp w until all its lanes stand at a block barrier (SYNC) or have returned (DONE), or until it must wait
// (MBAR), or, with NONE, for at most `budget` collectives.
static Op run_warp(int w, int budget) {
    Lane* W = &lanes[w * 32];
    for (;;) {
        bool progress = false, waiting = false, yielded = false;
        for (int l = 0; l < 32; l++) {
            if (W[l].op == MBAR && mbar(W[l].bar).phase != W[l].parity) W[l].op = NONE;
            if (W[l].op == NONE) resume(w * 32 + l), progress = true;
        }
        for (int l = 0; l < 32; l++) {
            waiting |= W[l].op == MBAR;
            if (W[l].op == YIELD) W[l].op = NONE, yielded = true;
        }
        if (yielded) return NONE;
        if (waiting && progress) continue;
        if (waiting) return MBAR;
        cur = w * 32;
        const Op op = W[0].op;
        for (int l = 1; l < 32; l++)
            if (W[l].op != op || W[l].n != W[0].n) fail("lanes of a warp met different collectives");
        switch (op) {
            case LDM: do_ldmatrix(W, false); break;
            case LDM_T: do_ldmatrix(W, true); break;
            case MMA16: do_mma(W, 16); break;
            case MMA8: do_mma(W, 8); break;
            case SHFL: do_shfl(W); break;
            case WGMMA: do_wgmma(W, w); break;
            case WGMMA_COMMIT:  // even schedules read the operands as early as possible, odd ones as late
                streams[w].groups.emplace_back();
                if (schedule % 2 == 0 && wgmma_ready(w, 0)) wgmma_run(w, 0);
                break;
            case WGMMA_WAIT:
                if (!wgmma_ready(w, W[0].n)) return MBAR;
                wgmma_retire(w, W[0].n);
                break;
            default: return op;
        }
        for (int l = 0; l < 32; l++) W[l].op = NONE;
        if (--budget == 0 || op == WGMMA_WAIT) return NONE;
    }
}
static bool may_go_on(int w) {
    for (int l = w * 32; l < w * 32 + 32; l++)
        if (lanes[l].op == MBAR ? mbar(lanes[l].bar).phase != lanes[l].parity
                                : lanes[l].op == WGMMA_WAIT && wgmma_ready(w, lanes[l].n))
            return true;
    return false;
}
static void run_block(int warps) {
    std::vector<Op> state(warps, NONE);
    for (;;) {
        std::vector<int> ready;
        bool blocked = false;
        for (int w = 0; w < warps; w++) {
            if (state[w] == MBAR && may_go_on(w)) state[w] = NONE;
            blocked |= state[w] == MBAR;
            if (state[w] == NONE) ready.push_back(w);
        }
        if (!tmas.empty() && (schedule == 0 || ready.empty() || (schedule > 2 && rng() % 8 == 0))) {
            finish_tma(schedule == 0 ? 0 : schedule < 3 ? tmas.size() - 1 : rng() % tmas.size());
            continue;
        }
        if (ready.empty() && blocked) fail("deadlock: every warp waits for an mbarrier or a wgmma");
        if (ready.empty()) {
            for (Op s : state)
                if (s != state[0]) fail("some warps returned while others wait at __syncthreads");
            if (state[0] == DONE) break;
            stats.barriers++;
            std::fill(state.begin(), state.end(), NONE);
            for (auto& lane : lanes) lane.op = NONE;
            continue;
        }
        const bool producer_first = schedule == 1 && ready.back() >= warps - 4;
        const int w = schedule > 2 ? ready[rng() % ready.size()]
                      : schedule == 2 || producer_first ? ready.back() : ready.front();
        state[w] = run_warp(w, schedule < 3 ? 1 << 30 : 1 + rng() % 64);
    }
    for (auto& s : streams)
        if (!s.shadow.empty()) fail("wgmma still in flight at the end");
}
// schedule 0: warps in ascending order, TMA at once. 1: the last warpgroup first, then ascending. 2: descending; TMA of
// 1 and 2 as late as possible and the last one first. Any other number: at random, with that seed.
static void launch(dim3 grid, int threads, size_t shared, unsigned schedule_, std::function<void()> fn) {
    schedule = schedule_, body = fn, gridDim = grid, blockDim.x = threads, smem_bytes = shared;
    lanes.resize(threads);
    rng.seed(schedule);
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                smem.assign(shared / 2 + 1024, 0xffff);  // NaN in fp16 and bf16
                mbars.assign(shared / 8 + 1, {});
                tmas.clear();
                streams.assign((threads / 32 + 3) / 4 * 4, {});
                for (auto& lane : lanes) start(lane);
                run_block(threads / 32);
            }
}
}  // namespace shim
using shim::blockDim;
using shim::blockIdx;
using shim::gridDim;
using shim::threadIdx;
#include "instructions.h"
