// Attention on CPUs with AVX-512, for float32 and, with AVX-512-BF16, for bfloat16. The scores are never written out
// (README.md walks to the online softmax): six queries meet 64 keys in 24 registers, and what is left of the scores is
// their exponentials, in the first-level cache, until they have weighted the values.
//
// Scores, softmax and sums are float32. With BFLOAT16 the products are vdpbf16ps, which multiplies TOGETHER = 2 numbers
// of each lane and adds both in float32; keys and values are packed for it, and weights are rounded before the second
// product. Without, they are ordinary multiply-adds, TOGETHER = 1. COLUMNS is the head's width in registers of floats.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>

namespace {

constexpr int LANES = 16;        // floats in a register
constexpr int QUERIES = 48;      // that a thread works on: a multiple of the rows of both products
constexpr int KEYS = 4 * LANES;  // that they meet at a time
constexpr float LEAST = -1e30f;  // below every score; less infinite than -∞, so that differences are numbers

#if BFLOAT16
using Number = uint16_t;
using Numbers = __m512bh;
constexpr int TOGETHER = 2;
Numbers load(const Number *p) { return (Numbers)_mm512_load_si512(p); }
Numbers broadcast(const Number *p) {
    int32_t both;
    std::memcpy(&both, p, sizeof both);
    return (Numbers)_mm512_set1_epi32(both);
}
__m512 multiply_add(__m512 sum, Numbers a, Numbers b) { return _mm512_dpbf16_ps(sum, a, b); }
void store(Number *p, __mmask16 some, __m512 x) {
    _mm256_mask_storeu_epi16(p, some, (__m256i)_mm512_cvtneps_pbh(x));
}
#else
using Number = float;
using Numbers = __m512;
constexpr int TOGETHER = 1;
Numbers load(const Number *p) { return _mm512_load_ps(p); }
Numbers broadcast(const Number *p) { return _mm512_set1_ps(*p); }
__m512 multiply_add(__m512 sum, Numbers a, Numbers b) { return _mm512_fmadd_ps(a, b, sum); }
void store(Number *p, __mmask16 some, __m512 x) { _mm512_mask_storeu_ps(p, some, x); }
#endif

struct Strides {  // in numbers; a head's are next to one another
    int64_t image, token, head;
};

struct Problem {  // avx512.py has the same
    const void *q, *k, *v;
    void *out;
    Strides q_strides, k_strides, v_strides, out_strides;
    int64_t images, queries, keys, heads, width;
    int64_t parts;  // of the queries of a head: images · heads · parts tasks
    int threads;
    float scale;
};

template <typename T>
class Aligned {  // zeros, at a multiple of a register's size
    T *const data;

   public:
    explicit Aligned(int64_t size) : data(static_cast<T *>(::operator new(size * sizeof(T), std::align_val_t(64)))) {
        std::memset(data, 0, size * sizeof(T));
    }
    ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
    Aligned(const Aligned &) = delete;
    operator T *() const { return data; }
};

// 2^x, to 2e-7: a polynomial (the best of degree 5) between -1/2 and 1/2, times a power of two. Far below 0 it is 0.
__m512 exp2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(0.00132764713f);
    for (const float c : {0.00967554096f, 0.0555071309f, 0.240221202f, 0.693146944f, 1.00000012f})
        y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, whole);
}

// What a thread works on: QUERIES queries of a head, COLUMNS registers wide, and all of its keys and values.
struct Attention {
    static constexpr int WIDE = COLUMNS * LANES;

    const int64_t width;  // a multiple of TOGETHER
    const float scale;    // for powers of two
    Aligned<Number> q, k, v, weights{QUERIES * KEYS};
    // of the keys that were met so far; sums lane by lane
    Aligned<float> out{QUERIES * WIDE}, sums{QUERIES * LANES}, largest{QUERIES}, shrink{QUERIES};

    explicit Attention(const Problem &p)
        : width(p.width),
          scale(p.scale * 1.44269504f),
          q(QUERIES * p.width),
          k((p.keys + KEYS) * p.width),
          v((p.keys + KEYS) * WIDE) {}

    // Keys lie as [j / LANES][c / TOGETHER][j % LANES][c % TOGETHER], values as [j / TOGETHER][c][j % TOGETHER].
    void pack(const Number *keys, const Number *values, const Problem &p) {
        for (int64_t j = 0; j < p.keys; j++) {
            for (int64_t c = 0; c < width; c += TOGETHER)
                std::copy_n(keys + j * p.k_strides.token + c, TOGETHER,
                            k + (j / LANES * width + c) * LANES + j % LANES * TOGETHER);
            for (int64_t c = 0; c < width; c++)
                v[(j / TOGETHER * WIDE + c) * TOGETHER + j % TOGETHER] = values[j * p.v_strides.token + c];
        }
    }

    void run(const Number *queries, int64_t rows, Number *to, const Problem &p) {
        for (int64_t r = 0; r < rows; r++) std::copy_n(queries + r * p.q_strides.token, width, q + r * width);
        std::fill_n(static_cast<float *>(largest), QUERIES, LEAST);
        std::fill_n(static_cast<float *>(sums), QUERIES * LANES, 0.0f);
        std::fill_n(static_cast<float *>(out), QUERIES * WIDE, 0.0f);
        for (int64_t first = 0; first < p.keys; first += KEYS) {
            const int keys = std::min<int64_t>(KEYS, p.keys - first);
            switch ((keys + LANES - 1) / LANES) {
                case 1: score<1>(first, keys); break;
                case 2: score<2>(first, keys); break;
                case 3: score<3>(first, keys); break;
                case 4: score<4>(first, keys); break;
            }
            weigh(first, keys);
        }
        for (int64_t r = 0; r < rows; r++) {
            const __m512 sum = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_load_ps(sums + r * LANES)));
            for (int64_t c = 0; c < width; c += LANES)
                store(to + r * p.out_strides.token + c, first_lanes(width - c),
                      _mm512_div_ps(_mm512_load_ps(out + r * WIDE + c), sum));
        }
    }

   private:
    static __mmask16 first_lanes(int64_t n) { return n >= LANES ? 0xffff : (1 << n) - 1; }

    // The weights of VECTORS·LANES keys, of which `keys` exist, for all queries; and their place in the softmax.
    template <int VECTORS>
    void score(int64_t first, int keys) {
        constexpr int ROWS = 6;
        const __m512 factor = _mm512_set1_ps(scale), never = _mm512_set1_ps(LEAST);
        for (int row = 0; row < QUERIES; row += ROWS) {
            __m512 s[ROWS][VECTORS] = {};
            for (int64_t c = 0; c < width; c += TOGETHER) {
                Numbers key[VECTORS];
                for (int j = 0; j < VECTORS; j++) key[j] = load(k + (first + j * LANES) * width + c * LANES);
                for (int r = 0; r < ROWS; r++) {
                    const auto query = broadcast(q + (row + r) * width + c);
                    for (int j = 0; j < VECTORS; j++) s[r][j] = multiply_add(s[r][j], query, key[j]);
                }
            }
            for (int r = 0; r < ROWS; r++) {
                auto &last = s[r][VECTORS - 1];
                last = _mm512_mask_mov_ps(never, first_lanes(keys - (VECTORS - 1) * LANES), last);
                __m512 most = last;
                for (int j = 0; j < VECTORS - 1; j++) most = _mm512_max_ps(most, s[r][j]);
                float &most_yet = largest[row + r];
                __m512 ratio = _mm512_set1_ps(1);
                if (_mm512_cmp_ps_mask(most, _mm512_set1_ps(most_yet), _CMP_GT_OQ)) {  // seldom, after the first keys
                    const float now = _mm512_reduce_max_ps(most);
                    ratio = exp2(_mm512_set1_ps((most_yet - now) * scale));
                    most_yet = now;
                }
                const __m512 less = _mm512_set1_ps(-most_yet * scale);
                __m512 sum = _mm512_mul_ps(_mm512_load_ps(sums + (row + r) * LANES), ratio);
                for (int j = 0; j < VECTORS; j++) {
                    const __m512 weight = exp2(_mm512_fmadd_ps(s[r][j], factor, less));
                    sum = _mm512_add_ps(sum, weight);
                    store(weights + (row + r) * KEYS + j * LANES, 0xffff, weight);
                }
                _mm512_store_ps(sums + (row + r) * LANES, sum);
                shrink[row + r] = _mm512_cvtss_f32(ratio);
            }
        }
    }

    // out = out · shrink + weights · values. Where the keys are odd, the one too many has the weight 0.
    void weigh(int64_t first, int keys) {
        constexpr int ROWS = COLUMNS <= 3 ? 8 : COLUMNS == 4 ? 6 : COLUMNS <= 6 ? 4 : COLUMNS <= 8 ? 3 : 2;
        for (int row = 0; row < QUERIES; row += ROWS) {
            __m512 o[ROWS][COLUMNS];
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLUMNS; c++)
                    o[r][c] = _mm512_mul_ps(_mm512_load_ps(out + (row + r) * WIDE + c * LANES),
                                            _mm512_set1_ps(shrink[row + r]));
            for (int j = 0; j < keys; j += TOGETHER) {
                Numbers value[COLUMNS];
                for (int c = 0; c < COLUMNS; c++) value[c] = load(v + (first + j) * WIDE + c * LANES * TOGETHER);
                for (int r = 0; r < ROWS; r++) {
                    const auto weight = broadcast(weights + (row + r) * KEYS + j);
                    for (int c = 0; c < COLUMNS; c++) o[r][c] = multiply_add(o[r][c], weight, value[c]);
                }
            }
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLUMNS; c++) _mm512_store_ps(out + (row + r) * WIDE + c * LANES, o[r][c]);
        }
    }
};

// One thread's work: tasks as long as there are any. Each has some queries of one head.
void work(const Problem &p, std::atomic<int64_t> &next) {
    Attention mine(p);
    const int64_t blocks = (p.queries + QUERIES - 1) / QUERIES, each = (blocks + p.parts - 1) / p.parts;
    int64_t packed = -1, task;
    while ((task = next++) < p.images * p.heads * p.parts) {
        const int64_t part = task % p.parts, head = task / p.parts % p.heads, image = task / p.parts / p.heads;
        const auto at = [&](const void *x, const Strides &s) {
            return static_cast<const Number *>(x) + image * s.image + head * s.head;
        };
        if (packed != task / p.parts) mine.pack(at(p.k, p.k_strides), at(p.v, p.v_strides), p);
        packed = task / p.parts;
        for (int64_t first = part * each * QUERIES, n = 0; n < each && first < p.queries; n++, first += QUERIES)
            mine.run(at(p.q, p.q_strides) + first * p.q_strides.token, std::min<int64_t>(QUERIES, p.queries - first),
                     const_cast<Number *>(at(p.out, p.out_strides)) + first * p.out_strides.token, p);
    }
}

}  // namespace

// 1 where the memory for a head's keys and values is lacking, else 0.
extern "C" int attention(const Problem *p) {
    std::atomic<int64_t> next{0};  // the first task that no thread has taken
    std::atomic<int> failed{0};
#pragma omp parallel num_threads(p->threads)
    try {
        work(*p, next);
    } catch (const std::bad_alloc &) {
        failed = 1;
    }
    return failed;
}
