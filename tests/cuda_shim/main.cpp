// The C function that the Python tests call: one launch of one kernel instance, named as NVRTC names it.
// `instances.inc` is written by the tests from the list of the host: INSTANCE(backward_dq<Half, 40, 64, 4, 1>) and so on.
#define MINISD_CPU 1
#include "conformance.cu"
#include "attention_sm90.cu"

// The maps that the host would encode.
template <class T, int D, int N, int WGS, int STAGES> static const Sm90Params& with_maps(const Params& p) {
    static Sm90Params m;
    auto map = [](const View& x, int tokens, int rows) {
        return TensorMap{x.data, x.batch, x.token, x.head, D, tokens, rows};
    };
    m = {map(p.q, p.nq, 64 * WGS), map(p.k, p.nk, N), map(p.v, p.nk, N), p};
    return m;
}

extern "C" int emulate(const char* name, const Params* p, unsigned x, unsigned y, unsigned z, int threads,
                       long shared, unsigned schedule, shim::Stats* stats) {
    shim::stats = {};
    bool found = false;
    const Params params = *p;
#define INSTANCE(...)                                                                                   \
    if (!found && !strcmp(name, #__VA_ARGS__)) {                                                        \
        found = true;                                                                                   \
        shim::launch({x, y, z}, threads, shared, schedule, [&] { __VA_ARGS__(params); });               \
    }
#define HOPPER(...)                                                                                     \
    if (!found && !strcmp(name, "forward_sm90<" #__VA_ARGS__ ">")) {                                    \
        found = true;                                                                                   \
        shim::launch({x, y, z}, threads, shared, schedule,                                              \
                     [&] { forward_sm90<__VA_ARGS__>(with_maps<__VA_ARGS__>(params)); });               \
    }
#include "instances.inc"
    *stats = shim::stats;
    return found ? 0 : 1;
}
