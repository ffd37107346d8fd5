// The kernels of many tokens: matrices meet them on tensor cores, in float16 with sums in float32. Every token's vector
// is scaled by a power of two first, so that nothing leaves float16's range.
#pragma once

#include "decode.h"

namespace pi::card {

constexpr uint32_t TILE_TOKENS = 64, TILE_OUT = 128, TILE_K = 32;
constexpr uint32_t HALF_PAD = 8;  // halves that keep rows of a tile in different banks

// A batch's vectors in float16: (n_tokens, ld), zeros beyond n; x = back[t] * half.
struct Halves {
    __half* x;
    float* back;
    uint32_t ld;  // a multiple of TILE_K
};

// The power of two that brings most to [2^13, 2^14), and its inverse.
__device__ __forceinline__ float range_scale(float most, float& back) {
    int exponent = 0;
    if (most > 0 && isfinite(most)) frexpf(most, &exponent);
    exponent = 14 - max(exponent, -100);
    back = ldexpf(1.0f, -exponent);
    return ldexpf(1.0f, exponent);
}

// One token's vector of n floats to row t, by a whole block.
__device__ __forceinline__ void halve_row(const float* x, uint32_t n, const Halves& out, uint32_t t) {
    float most = 0, back;
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) most = fmaxf(most, fabsf(x[i]));
    const float scale = range_scale(block_max(most), back);
    __half* to = out.x + uint64_t(t) * out.ld;
    for (uint32_t i = threadIdx.x; i < out.ld; i += blockDim.x) to[i] = __float2half_rn(i < n ? x[i] * scale : 0);
    if (threadIdx.x == 0) out.back[t] = back;
}

// in: (n_tokens, n), ld_in apart.   A block a token.
__global__ void __launch_bounds__(THREADS) halve(const float* in, uint32_t n, uint32_t ld_in, Halves out) {
    halve_row(in + uint64_t(blockIdx.x) * ld_in, n, out, blockIdx.x);
}

// ---- matrices

struct GemmJob {
    CardRows rows;
    uint32_t n_rows;
    Halves x;
    uint32_t n_tokens;
    const float* bias;  // NULL, or one for each element of a token's result
    float* out;         // (n_tokens, ld)
    uint64_t ld;
    bool add;  // to what out holds
};

// 16 elements of a row from k on (a multiple of 16), as they lie there: half a block of Q4_0 comes with the other half.
template <Type T>
struct Sixteen {
    static constexpr uint32_t PIECES = PER_PIECE<T> < 16 ? 16 / PER_PIECE<T> : 1;
    uint4 pieces[PIECES];
    __half scale;
};

// Beyond the last piece lies the next row, or nothing: zeros.
template <Type T>
__device__ __forceinline__ void load16(const uint8_t* row, uint32_t n, uint32_t k, Sixteen<T>& out) {
    constexpr uint32_t E = PER_PIECE<T>;
#pragma unroll
    for (uint32_t i = 0; i < Sixteen<T>::PIECES; i++)
        out.pieces[i] = k + i * E < n ? load_weights(row + (k / E + i) * PIECE_BYTES) : make_uint4(0, 0, 0, 0);
    if constexpr (HAS_SCALES<T>) out.scale = k < n ? half_scale_of<T>(row, n, k / E) : __float2half_rn(0);
}

// The same as numbers, zeros from n on.
template <Type T>
__device__ __forceinline__ void expand16(const Sixteen<T>& from, uint32_t n, uint32_t k, __half* out) {
    constexpr uint32_t E = PER_PIECE<T>;
    float values[E < 16 ? 16 : E], d = 1;
    if constexpr (HAS_SCALES<T>) d = __half2float(from.scale);
#pragma unroll
    for (uint32_t i = 0; i < Sixteen<T>::PIECES; i++) expand_piece<T>(from.pieces[i], values + i * E);
    const bool second = E == 32 && k % 32 == 16;  // half of Q4_0's block
#pragma unroll
    for (uint32_t i = 0; i < 16; i++) {
        const float value = second ? values[E == 32 ? 16 + i : i] : values[i];
        out[i] = __float2half_rn(k + i < n ? d * value : 0);
    }
}

// A tile's weights, as tensor cores take them: of rows (TILE_OUT, TILE_K), of columns (TILE_K, TILE_OUT).
template <bool COLUMNS>
constexpr uint32_t WEIGHTS_LD = COLUMNS ? TILE_OUT + HALF_PAD : TILE_K + HALF_PAD;

// This thread's 16 weights of the tile (out, k): of row i, from element e on. COLUMNS: the rows' elements are the
// outputs, the rows are summed.
template <bool COLUMNS>
struct Share {
    uint32_t i, e;
    __device__ __forceinline__ Share(uint32_t out, uint32_t k)
        : i(COLUMNS ? k + threadIdx.x / 8 : out + threadIdx.x / 2),
          e(COLUMNS ? out + threadIdx.x % 8 * 16 : k + threadIdx.x % 2 * 16) {}
    // Elements of the row: none beyond the last one.
    __device__ __forceinline__ uint32_t n(const GemmJob& job) const { return i < job.n_rows ? job.rows.n : 0; }
};

constexpr uint32_t GEMM_BYTES =
    TILE_TOKENS * (TILE_OUT + 4) * sizeof(float);  // of results, which is more than of tiles

// out[t][j] (+)= back[t] * sum over k of x[t][k] * w + bias[j], w = row_j[k], or with COLUMNS row_k[j]. A block
// computes TILE_TOKENS by TILE_OUT of it, a warp 32 by 32; the next tiles are on their way while these are multiplied:
// what is loaded is not looked at before.
template <Type T, bool COLUMNS>
__global__ void __launch_bounds__(THREADS) gemm(GemmJob job) {
    using namespace nvcuda;
    constexpr uint32_t X_LD = TILE_K + HALF_PAD, W_LD = WEIGHTS_LD<COLUMNS>, OUT_LD = TILE_OUT + 4;
    const uint32_t n_out = COLUMNS ? job.rows.n : job.n_rows, n_k = COLUMNS ? job.n_rows : job.rows.n;
    const uint32_t out0 = blockIdx.x * TILE_OUT, t0 = blockIdx.y * TILE_TOKENS, warp = threadIdx.x / WARP;
    const uint32_t warp_t = warp % 2 * 32, warp_out = warp / 2 * 32;
    auto* x_tile = static_cast<__half*>(dynamic_shared());  // (TILE_TOKENS, X_LD)
    __half* w_tile = x_tile + TILE_TOKENS * X_LD;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum[2][2];
    for (auto& row : sum)
        for (auto& s : row) wmma::fill_fragment(s, 0.0f);

    const uint32_t x_row = threadIdx.x / 4, x_col = threadIdx.x % 4 * 8;
    uint4 next_x;
    Sixteen<T> next_w;
    auto load = [&](uint32_t k) {
        next_x = t0 + x_row < job.n_tokens
                     ? *reinterpret_cast<const uint4*>(job.x.x + uint64_t(t0 + x_row) * job.x.ld + k + x_col)
                     : make_uint4(0, 0, 0, 0);
        const Share<COLUMNS> share(out0, k);
        load16<T>(job.rows.row(share.i), share.n(job), share.e, next_w);
    };
    auto store = [&](uint32_t k) {
        *reinterpret_cast<uint4*>(x_tile + x_row * X_LD + x_col) = next_x;
        __half* to = COLUMNS ? w_tile + threadIdx.x / 8 * W_LD + threadIdx.x % 8 * 16
                             : w_tile + threadIdx.x / 2 * W_LD + threadIdx.x % 2 * 16;
        const Share<COLUMNS> share(out0, k);
        alignas(16) __half weights[16];
        expand16<T>(next_w, share.n(job), share.e, weights);
        reinterpret_cast<uint4*>(to)[0] = reinterpret_cast<const uint4*>(weights)[0];
        reinterpret_cast<uint4*>(to)[1] = reinterpret_cast<const uint4*>(weights)[1];
    };
    load(0);
    for (uint32_t k = 0; k < n_k; k += TILE_K) {
        store(k);
        __syncthreads();
        if (k + TILE_K < n_k) load(k + TILE_K);
#pragma unroll
        for (uint32_t kk = 0; kk < TILE_K; kk += 16) {
            using Layout = std::conditional_t<COLUMNS, wmma::row_major, wmma::col_major>;
            wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> a[2];
            wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, Layout> b[2];
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                wmma::load_matrix_sync(a[i], x_tile + (warp_t + 16 * i) * X_LD + kk, X_LD);
                const uint32_t o = warp_out + 16 * i;
                wmma::load_matrix_sync(b[i], w_tile + (COLUMNS ? kk * W_LD + o : o * W_LD + kk), W_LD);
            }
#pragma unroll
            for (uint32_t i = 0; i < 2; i++)
#pragma unroll
                for (uint32_t j = 0; j < 2; j++) wmma::mma_sync(sum[i][j], a[i], b[j], sum[i][j]);
        }
        __syncthreads();
    }

    auto* result = static_cast<float*>(dynamic_shared());  // (TILE_TOKENS, OUT_LD), in the tiles' place
#pragma unroll
    for (uint32_t i = 0; i < 2; i++)
#pragma unroll
        for (uint32_t j = 0; j < 2; j++)
            wmma::store_matrix_sync(result + (warp_t + 16 * i) * OUT_LD + warp_out + 16 * j, sum[i][j], OUT_LD,
                                    wmma::mem_row_major);
    __syncthreads();
    for (uint32_t at = threadIdx.x; at < TILE_TOKENS * TILE_OUT; at += THREADS) {
        const uint32_t t = t0 + at / TILE_OUT, o = out0 + at % TILE_OUT;
        if (t >= job.n_tokens || o >= n_out) continue;
        const float value = result[at / TILE_OUT * OUT_LD + at % TILE_OUT] * job.x.back[t];
        float* to = job.out + t * job.ld + o;
        *to = (job.add ? *to : 0.0f) + (value + (job.bias ? job.bias[o] : 0.0f));
    }
}

// ---- attention

constexpr uint32_t KEYS = 32, BATCH_THREADS = 128;

// Shared memory of attend_batch, in this order.
template <uint32_t QUERIES>
struct AttendLayout {
    uint32_t dim, half_ld, out_ld;
    __host__ __device__ explicit AttendLayout(uint32_t head_dim)
        : dim((head_dim + 15) / 16 * 16), half_ld(dim + HALF_PAD), out_ld(dim + 4) {}
    static constexpr uint32_t SCORE_LD = KEYS + 4, WEIGHT_LD = KEYS + HALF_PAD;
    __host__ __device__ uint32_t out() const { return 0; }  // (QUERIES, out_ld) float
    __host__ __device__ uint32_t scores() const { return out() + QUERIES * out_ld * 4; }
    __host__ __device__ uint32_t weights() const { return scores() + QUERIES * SCORE_LD * 4; }
    __host__ __device__ uint32_t queries() const { return weights() + QUERIES * WEIGHT_LD * 2; }
    __host__ __device__ uint32_t cached() const { return queries() + QUERIES * half_ld * 2; }  // (KEYS, half_ld)
    __host__ __device__ uint32_t bytes() const { return cached() + KEYS * half_ld * 2; }
};

// Cached positions [p0, p0 + KEYS) of a head, zeros from n_pos on, to shared memory.
__device__ __forceinline__ void load_cached(const __half* cache, uint32_t ld, uint32_t p0, uint32_t n_pos, uint32_t dim,
                                            uint32_t to_ld, __half* to) {
    const uint32_t pieces = dim / 8;
    for (uint32_t at = threadIdx.x; at < KEYS * pieces; at += BATCH_THREADS) {
        const uint32_t p = p0 + at / pieces, e = at % pieces * 8;
        const bool here = p < n_pos && e < ld;
        *reinterpret_cast<uint4*>(to + at / pieces * to_ld + e) =
            here ? *reinterpret_cast<const uint4*>(cache + uint64_t(p) * ld + e) : make_uint4(0, 0, 0, 0);
    }
}

// Causal attention of QUERIES tokens (from blockIdx.x * QUERIES on) of head blockIdx.y over the cache, KEYS positions
// at a time with an online softmax.   q, out: (n_tokens, n_head, head_dim)
template <uint32_t QUERIES>
__global__ void __launch_bounds__(BATCH_THREADS) attend_batch(Heads a, const float* q, uint32_t n_tokens, float* out) {
    using namespace nvcuda;
    using Layout = AttendLayout<QUERIES>;
    constexpr uint32_t LANES = BATCH_THREADS / QUERIES;  // threads that share a query in the softmax: of one warp
    const Layout at(a.head_dim);
    auto* memory = static_cast<uint8_t*>(dynamic_shared());
    auto *sums = reinterpret_cast<float*>(memory + at.out()), *scores = reinterpret_cast<float*>(memory + at.scores());
    auto *weights = reinterpret_cast<__half*>(memory + at.weights()),
         *queries = reinterpret_cast<__half*>(memory + at.queries()),
         *cached = reinterpret_cast<__half*>(memory + at.cached());
    const uint32_t head = blockIdx.y, kv = head / (a.n_head / a.n_head_kv), t0 = blockIdx.x * QUERIES;
    const uint32_t n_queries = min(QUERIES, n_tokens - t0), n_pos = a.state->position + t0 + n_queries;
    const uint32_t warp = threadIdx.x / WARP, mine = threadIdx.x / LANES, part = threadIdx.x % LANES;
    const uint32_t last_pos = a.state->position + t0 + mine;  // that my query sees
    const float scale = 1.0f / sqrtf(float(a.head_dim));
    const __half *keys = a.keys + uint64_t(kv) * a.n_ctx * a.ld, *values = a.values + uint64_t(kv) * a.n_ctx * a.ld;

    for (uint32_t i = threadIdx.x; i < QUERIES * at.dim; i += BATCH_THREADS) {
        const uint32_t t = i / at.dim, j = i % at.dim;
        const bool here = t < n_queries && j < a.head_dim;
        queries[t * at.half_ld + j] =
            __float2half_rn(here ? q[(uint64_t(t0 + t) * a.n_head + head) * a.head_dim + j] : 0);
        sums[t * at.out_ld + j] = 0;
    }
    float most = -INFINITY, total = 0;  // of my query, the same in the threads that share it
    for (uint32_t p0 = 0; p0 < n_pos; p0 += KEYS) {
        __syncthreads();
        load_cached(keys, a.ld, p0, n_pos, at.dim, at.half_ld, cached);
        __syncthreads();
        for (uint32_t tile = warp; tile < QUERIES / 16 * (KEYS / 16); tile += BATCH_THREADS / WARP) {
            const uint32_t i = tile / (KEYS / 16) * 16, j = tile % (KEYS / 16) * 16;
            wmma::fragment<wmma::accumulator, 16, 16, 16, float> s;
            wmma::fill_fragment(s, 0.0f);
            for (uint32_t k = 0; k < at.dim; k += 16) {
                wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> x;
                wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::col_major> y;
                wmma::load_matrix_sync(x, queries + i * at.half_ld + k, at.half_ld);
                wmma::load_matrix_sync(y, cached + j * at.half_ld + k, at.half_ld);
                wmma::mma_sync(s, x, y, s);
            }
            wmma::store_matrix_sync(scores + i * Layout::SCORE_LD + j, s, Layout::SCORE_LD, wmma::mem_row_major);
        }
        __syncthreads();
        load_cached(values, a.ld, p0, n_pos, at.dim, at.half_ld, cached);
        float seen = most;
        for (uint32_t p = part; p < KEYS; p += LANES)
            if (p0 + p <= last_pos) seen = fmaxf(seen, scale * scores[mine * Layout::SCORE_LD + p]);
        for (uint32_t with = LANES / 2; with > 0; with /= 2) seen = fmaxf(seen, __shfl_xor_sync(ALL, seen, with));
        const float shrink = weight_of(most, seen);
        float added = 0;
        for (uint32_t p = part; p < KEYS; p += LANES) {
            const float score = scale * scores[mine * Layout::SCORE_LD + p];
            const float weight = p0 + p <= last_pos ? expf(score - seen) : 0;
            weights[mine * Layout::WEIGHT_LD + p] = __float2half_rn(weight);
            added += weight;
        }
        for (uint32_t with = LANES / 2; with > 0; with /= 2) added += __shfl_xor_sync(ALL, added, with);
        total = total * shrink + added;
        most = seen;
        for (uint32_t j = part; j < at.dim; j += LANES) sums[mine * at.out_ld + j] *= shrink;
        __syncthreads();
        for (uint32_t tile = warp; tile < QUERIES / 16 * (at.dim / 16); tile += BATCH_THREADS / WARP) {
            const uint32_t i = tile / (at.dim / 16) * 16, j = tile % (at.dim / 16) * 16;
            wmma::fragment<wmma::accumulator, 16, 16, 16, float> s;
            wmma::load_matrix_sync(s, sums + i * at.out_ld + j, at.out_ld, wmma::mem_row_major);
            for (uint32_t k = 0; k < KEYS; k += 16) {
                wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> x;
                wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> y;
                wmma::load_matrix_sync(x, weights + i * Layout::WEIGHT_LD + k, Layout::WEIGHT_LD);
                wmma::load_matrix_sync(y, cached + k * at.half_ld + j, at.half_ld);
                wmma::mma_sync(s, x, y, s);
            }
            wmma::store_matrix_sync(sums + i * at.out_ld + j, s, at.out_ld, wmma::mem_row_major);
        }
    }
    __syncthreads();
    if (mine >= n_queries) return;
    for (uint32_t j = part; j < a.head_dim; j += LANES)
        out[(uint64_t(t0 + mine) * a.n_head + head) * a.head_dim + j] = sums[mine * at.out_ld + j] / total;
}

// ---- the FFN

// What neurons of a layer counted over a batch's tokens: how many fired, were chosen, and both.
struct ScoreCounts {
    unsigned long long n_true, n_predicted, n_hit;
};

struct BatchNeurons {
    float *select, *up;     // (n_tokens, n) as the matrices gave them; up: NULL where plain
    const float* forecast;  // (n_tokens, ld_forecast) NULL where none is asked; of neurons from asked_from on
    uint32_t n, first, asked_from, ld_forecast;
    Activating activating;
    bool selective;  // only what was chosen goes on, and is counted
    ScoreCounts* counts;
    Halves out;
};

// What the neurons hand on, in float16.   A block a token.
__global__ void __launch_bounds__(THREADS) fire_neurons(BatchNeurons b) {
    const uint64_t row = uint64_t(blockIdx.x) * b.n;
    float *select = b.select + row, *h = b.up ? b.up + row : select;
    int n_true = 0, n_predicted = 0, n_hit = 0;
    for (uint32_t i = threadIdx.x; i < b.n; i += blockDim.x) {
        const float a = activate(b.activating, select[i]);
        float value = b.up ? apply_up(b.activating, a, h[i]) : a;
        if (b.selective) {
            const uint32_t neuron = b.first + i;
            const bool fires = value != 0;
            bool predicted = a != 0;
            if (b.forecast)
                predicted = neuron < b.asked_from ||
                            !(b.forecast[uint64_t(blockIdx.x) * b.ld_forecast + neuron - b.asked_from] < 0);
            n_true += fires;
            n_predicted += predicted;
            n_hit += fires && predicted;
            if (b.forecast && !predicted) value = 0;
        }
        h[i] = value;
    }
    if (b.selective) {
        n_true = warp_sum(n_true);
        n_predicted = warp_sum(n_predicted);
        n_hit = warp_sum(n_hit);
        if (threadIdx.x % WARP == 0) {
            atomicAdd(&b.counts->n_true, (unsigned long long)n_true);
            atomicAdd(&b.counts->n_predicted, (unsigned long long)n_predicted);
            atomicAdd(&b.counts->n_hit, (unsigned long long)n_hit);
        }
    }
    halve_row(h, b.n, b.out, blockIdx.x);
}

}  // namespace pi::card
