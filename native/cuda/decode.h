// The kernels of one token: every row once, at the speed of the card's memory. Sums run in an order that sizes,
// positions and the active neurons alone decide: the same results in every run.
#pragma once

#include "rows.h"

namespace pi::card {

constexpr uint32_t THREADS = 256, WARPS = THREADS / WARP;

// Where a pass stands, in the card's memory: what a graph replays reads it there.
struct PassState {
    uint32_t position;  // of the first token
};

// state = the pass; cos and sin of row t for the position + t: (n, half)
__global__ void begin_pass(PassState* state, uint32_t position, uint32_t n, uint32_t half, const float* inv_freq,
                           float rope_scale, float* cos, float* sin) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i == 0) state->position = position;
    if (i >= n * half) return;
    const float angle = float(position + i / half) * inv_freq[i % half];
    cos[i] = cosf(angle) * rope_scale;
    sin[i] = sinf(angle) * rope_scale;
}

// ---- vectors

enum class Norming { Rms, Layer };

struct NormJob {
    const float* in;  // (n_tokens, n)
    uint32_t n;
    Norming norming;
    float eps;
    const float *weight, *bias;
    MutableVec out;  // (n_tokens, ld); q: NULL, or of the first token
    uint32_t ld;     // a multiple of 32
};

// A block a token: out = norm(in), with zeros up to a multiple of 32.
__global__ void __launch_bounds__(1024) normalise(NormJob job) {
    const float* in = job.in + uint64_t(blockIdx.x) * job.n;
    float sum = 0, mean = 0;
    if (job.norming == Norming::Layer) {
        for (uint32_t i = threadIdx.x; i < job.n; i += blockDim.x) sum += in[i];
        mean = block_sum(sum) / float(job.n);
        sum = 0;
    }
    for (uint32_t i = threadIdx.x; i < job.n; i += blockDim.x) sum += (in[i] - mean) * (in[i] - mean);
    const float scale = 1 / sqrtf(block_sum(sum) / float(job.n) + job.eps);
    MutableVec out = job.out;
    out.f += uint64_t(blockIdx.x) * job.ld;
    for (uint32_t i = threadIdx.x; i < job.ld; i += blockDim.x) {
        float x = 0;
        if (i < job.n) x = (in[i] - mean) * scale * (job.weight ? job.weight[i] : 1) + (job.bias ? job.bias[i] : 0);
        put(out, i, x);
    }
}

struct TakeJob {
    const float* in;  // (n_tokens, n)
    uint32_t n;
    bool relu;
    MutableVec out;  // (n_tokens, ld); q: NULL, or of the first token
    uint32_t ld;     // a multiple of 32
};

// out = in, with zeros up to a multiple of 32, of token blockIdx.y. A thread an element: what lies in the processor's
// memory comes in one go.
__global__ void __launch_bounds__(THREADS) take(TakeJob job) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= job.ld) return;
    float x = i < job.n ? job.in[uint64_t(blockIdx.y) * job.n + i] : 0;
    if (job.relu) x = x <= 0 ? 0 : x;
    MutableVec out = job.out;
    out.f += uint64_t(blockIdx.y) * job.ld;
    put(out, i, x);
}

// out (+)= the parts + bias.   parts: (n_parts, n); bias: (n_bias,) over and over, or NULL. GROUPS threads share an
// element: each adds every GROUPS-th part, in order, then their sums are added, in order.
template <uint32_t GROUPS>
__global__ void __launch_bounds__(THREADS)
    add_up(const float* parts, uint32_t n_parts, uint32_t n, const float* bias, uint32_t n_bias, float* out, bool add) {
    constexpr uint32_t ELEMENTS = THREADS / GROUPS;  // of a block
    __shared__ float sums[GROUPS][ELEMENTS];
    const uint32_t element = threadIdx.x % ELEMENTS, group = threadIdx.x / ELEMENTS;
    const uint32_t i = blockIdx.x * ELEMENTS + element;
    float sum = 0;
    if (i < n) {
#pragma unroll 4
        for (uint32_t p = group; p < n_parts; p += GROUPS) sum += parts[uint64_t(p) * n + i];
    }
    if constexpr (GROUPS > 1) {
        sums[group][element] = sum;
        __syncthreads();
        for (uint32_t g = 1; g < GROUPS; g++) sum += sums[g][element];
    }
    if (group > 0 || i >= n) return;
    if (bias) sum += bias[i % n_bias];
    out[i] = add ? out[i] + sum : sum;
}

// Rows of n elements, which lie ld_in apart, to rows ld_out apart.
__global__ void copy_rows(const float* in, uint32_t ld_in, float* out, uint32_t ld_out, uint32_t n, uint32_t n_rows) {
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x, t = i / n, k = i % n;
    if (t >= n_rows) return;
    out[t * ld_out + k] = in[t * ld_in + k];
}

constexpr uint32_t MAX_TOKENS = 256;
struct Tokens {
    int32_t id[MAX_TOKENS];
};

// out = the tokens' rows: (n_tokens, rows.n).   A block a token.
__global__ void __launch_bounds__(THREADS) embed_rows(CardRows rows, Tokens tokens, float* out) {
    const uint8_t* row = rows.row(uint64_t(tokens.id[blockIdx.x]));
    float* to = out + uint64_t(blockIdx.x) * rows.n;
    auto expand = [&](auto type) {
        constexpr Type T = decltype(type)::value;
        for (uint32_t p = threadIdx.x; p < pieces_of<T>(rows.n); p += blockDim.x) {
            float piece[PER_PIECE<T>];
            const float d = scale_of<T>(row, rows.n, p);
            expand_piece<T>(load_weights(row + p * PIECE_BYTES), piece);
            for (uint32_t i = 0; i < PER_PIECE<T> && p * PER_PIECE<T> + i < rows.n; i++)
                to[p * PER_PIECE<T> + i] = d * piece[i];
        }
    };
#define PI_EXPAND(T) expand(std::integral_constant<Type, T>{})
    PI_FOR_TYPE(rows.type, PI_EXPAND)
#undef PI_EXPAND
}

// ---- matrices

struct MatvecJob {
    CardRows rows;
    uint32_t n_rows;
    const float* bias;
    float* out;
};
struct MatvecJobs {
    MatvecJob job[3];
    Vec x;
    bool add;  // to what out holds
};

// A warp a row of the jobs' rows, one after the other. x is read through the caches: the first warp brings it there.
__global__ void __launch_bounds__(128) matvec(MatvecJobs jobs) {
    const uint32_t lane = threadIdx.x % WARP;
    uint32_t row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
#pragma unroll
    for (int j = 0; j < 3; j++) {  // constant indices keep the jobs out of local memory
        const MatvecJob& job = jobs.job[j];
        if (row < job.n_rows) {
            float sum = dot_row(job.rows, row, jobs.x, lane) + (job.bias ? job.bias[row] : 0.0f);
            if (lane == 0) job.out[row] = jobs.add ? job.out[row] + sum : sum;
            return;
        }
        row -= job.n_rows;
    }
}

// ---- attention

// Heads, and a layer's cache: (n_head_kv, n_ctx, ld) float16, zeros beyond head_dim.
struct Heads {
    uint32_t n_head, n_head_kv, head_dim, ld, n_ctx;
    uint32_t rotary_dim;  // 0: the layer does not rotate
    bool normed;
    float eps;
    const float *cos, *sin;  // (n_tokens, rotary_dim / 2)
    __half *keys, *values;
    const PassState* state;
};

// Element j of a rotated head x.
__device__ __forceinline__ float rotated(const float* x, uint32_t j, uint32_t dim, const float* cos, const float* sin) {
    const uint32_t half = dim / 2;
    if (j >= dim) return x[j];
    return j < half ? x[j] * cos[j] - x[j + half] * sin[j] : x[j - half] * sin[j - half] + x[j] * cos[j - half];
}

// A warp a head, of token blockIdx.y: queries as attention takes them; keys and values to the cache.
// q: (n_tokens, n_head, head_dim), changed in place; k, v: (n_tokens, n_head_kv, head_dim)
__global__ void __launch_bounds__(128) prepare_heads(Heads a, float* q, const float* k, const float* v) {
    const uint32_t lane = threadIdx.x % WARP, t = blockIdx.y;
    const uint32_t head = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (head >= a.n_head + a.n_head_kv) return;
    const bool is_query = head < a.n_head;
    const uint32_t kv = head - a.n_head;
    const float* x =
        is_query ? q + (uint64_t(t) * a.n_head + head) * a.head_dim : k + (uint64_t(t) * a.n_head_kv + kv) * a.head_dim;
    const float *cos = a.cos + t * (a.rotary_dim / 2), *sin = a.sin + t * (a.rotary_dim / 2);
    constexpr uint32_t MOST = 8;  // elements a lane: heads of up to 256
    float mine[MOST], squares = 0;
#pragma unroll
    for (uint32_t i = 0; i < MOST; i++) {
        const uint32_t j = lane + i * WARP;
        mine[i] = j < a.head_dim ? rotated(x, j, a.rotary_dim, cos, sin) : 0;
        squares += mine[i] * mine[i];
    }
    const float scale = a.normed ? 1 / sqrtf(warp_sum(squares) / float(a.head_dim) + a.eps) : 1;
    __syncwarp();  // all have read what is overwritten
    const uint64_t at = (uint64_t(kv) * a.n_ctx + a.state->position + t) * a.ld;
#pragma unroll
    for (uint32_t i = 0; i < MOST; i++) {
        const uint32_t j = lane + i * WARP;
        if (is_query) {
            if (j < a.head_dim) const_cast<float*>(x)[j] = mine[i] * scale;
        } else if (j < a.ld) {
            a.keys[at + j] = __float2half_rn(mine[i] * scale);
            const float* value = v + (uint64_t(t) * a.n_head_kv + kv) * a.head_dim;
            a.values[at + j] = __float2half_rn(j < a.head_dim ? value[j] : 0);
        }
    }
}

constexpr uint32_t ATTENTION_WARPS = 4;
constexpr uint32_t MIN_SPAN = 64;  // positions that are worth a block

// Positions of one split: a fixed grid of splits serves all positions, those beyond leave at once.
__device__ __forceinline__ uint32_t span_of(uint32_t n_pos, uint32_t n_splits) {
    return max(MIN_SPAN, (n_pos + n_splits - 1) / n_splits);
}

// exp(score - most); 1 where they are equal: nothing has been seen so far, and both are infinite.
__device__ __forceinline__ float weight_of(float score, float most) { return score == most ? 1 : expf(score - most); }

// An online softmax: the weighted sum of values so far, its weights' sum, and the largest score.
struct Softmax {
    float most = -INFINITY, sum = 0, out[8] = {};

    __device__ __forceinline__ void merge(float most2, float sum2, const float* out2) {
        const float m = fmaxf(most, most2);
        const float mine = weight_of(most, m), other = weight_of(most2, m);
        sum = sum * mine + sum2 * other;
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = out[i] * mine + out2[i] * other;
        most = m;
    }
};

// Attention of the Q queries from the blockIdx.y-th group of Q on (those of one head of keys) over one split.
// parts: (n_head, n_splits, ld + 2): the largest score, the weights' sum, the weighted sum of values
template <int Q>
__global__ void __launch_bounds__(ATTENTION_WARPS* WARP)
    attend_part(Heads a, const float* q, uint32_t n_splits, float* parts) {
    const uint32_t n_pos = a.state->position + 1, span = span_of(n_pos, n_splits), begin = blockIdx.x * span;
    if (begin >= n_pos) return;
    const uint32_t end = min(n_pos, begin + span), group = a.n_head / a.n_head_kv;
    const uint32_t blocks_a_head = (group + Q - 1) / Q, kv = blockIdx.y / blocks_a_head;
    const uint32_t first = kv * group + blockIdx.y % blocks_a_head * Q, last = (kv + 1) * group;  // queries
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    uint32_t lanes = 1;  // that share a position, 8 elements each
    while (lanes * 8 < a.ld) lanes *= 2;
    const uint32_t per_warp = WARP / lanes, e = lane % lanes * 8;
    const bool has_elements = e < a.ld;
    const float scale = 1.0f / sqrtf(float(a.head_dim));

    float query[Q][8];
    Softmax all[Q];
#pragma unroll
    for (int i = 0; i < Q; i++)
#pragma unroll
        for (uint32_t j = 0; j < 8; j++)
            query[i][j] = first + i < last && e + j < a.head_dim ? q[uint64_t(first + i) * a.head_dim + e + j] : 0;

    for (uint32_t p0 = begin + warp * per_warp; p0 < end; p0 += ATTENTION_WARPS * per_warp) {
        const uint32_t p = p0 + lane / lanes;
        const bool here = p < end;
        uint4 k4 = make_uint4(0, 0, 0, 0), v4 = k4;
        if (here && has_elements) {
            const uint64_t at = (uint64_t(kv) * a.n_ctx + p) * a.ld + e;
            k4 = *reinterpret_cast<const uint4*>(a.keys + at);
            v4 = *reinterpret_cast<const uint4*>(a.values + at);
        }
        float key[8], value[8];
        expand_piece<Type::F16>(k4, key);
        expand_piece<Type::F16>(v4, value);
#pragma unroll
        for (int i = 0; i < Q; i++) {
            float score = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) score += query[i][j] * key[j];
            for (uint32_t with = lanes / 2; with > 0; with /= 2) score += __shfl_xor_sync(ALL, score, with);
            if (here) all[i].merge(score * scale, 1, value);
        }
    }

    __shared__ float merged[ATTENTION_WARPS][Q][256 + 2];
#pragma unroll
    for (int i = 0; i < Q; i++) {
        for (uint32_t with = lanes; with < WARP; with *= 2) {
            float other[8];
#pragma unroll
            for (int j = 0; j < 8; j++) other[j] = __shfl_xor_sync(ALL, all[i].out[j], with);
            const float most = __shfl_xor_sync(ALL, all[i].most, with), sum = __shfl_xor_sync(ALL, all[i].sum, with);
            all[i].merge(most, sum, other);
        }
        if (lane >= lanes || !has_elements) continue;
        if (lane == 0) merged[warp][i][0] = all[i].most, merged[warp][i][1] = all[i].sum;
#pragma unroll
        for (int j = 0; j < 8; j++) merged[warp][i][2 + e + j] = all[i].out[j];
    }
    __syncthreads();
    for (uint32_t at = threadIdx.x; at < Q * a.ld; at += blockDim.x) {
        const uint32_t i = at / a.ld, j = at % a.ld;
        if (first + i >= last) break;
        float most = -INFINITY, sum = 0, out = 0;
        for (uint32_t w = 0; w < ATTENTION_WARPS; w++) most = fmaxf(most, merged[w][i][0]);
        for (uint32_t w = 0; w < ATTENTION_WARPS; w++) {
            const float weight = weight_of(merged[w][i][0], most);
            sum += weight * merged[w][i][1];
            out += weight * merged[w][i][2 + j];
        }
        float* to = parts + (uint64_t(first + i) * n_splits + blockIdx.x) * (a.ld + 2);
        if (j == 0) to[0] = most, to[1] = sum;
        to[2 + j] = out;
    }
}

// out = what the splits give together: (n_head * head_dim).   A warp 32 elements.
__global__ void __launch_bounds__(128) merge_parts(Heads a, uint32_t n_splits, const float* parts, MutableVec out) {
    const uint32_t e = blockIdx.x * blockDim.x + threadIdx.x, n = a.n_head * a.head_dim;
    if (e / WARP * WARP >= n) return;
    float value = 0;
    if (e < n) {
        const uint32_t n_pos = a.state->position + 1, span = span_of(n_pos, n_splits);
        const uint32_t used = (n_pos + span - 1) / span, j = e % a.head_dim;
        const float* part = parts + uint64_t(e / a.head_dim) * n_splits * (a.ld + 2);
        float most = -INFINITY, sum = 0;
        for (uint32_t s = 0; s < used; s++) most = fmaxf(most, part[s * (a.ld + 2)]);
        for (uint32_t s = 0; s < used; s++) {
            const float* p = part + s * (a.ld + 2);
            const float weight = expf(p[0] - most);
            sum += weight * p[1];
            value += weight * p[2 + j];
        }
        value /= sum;
    }
    put(out, e, value);
}

// ---- the FFN

struct Activating {
    Activation activation;
    float threshold;  // of fatrelu; of the others, where cut
    bool cut;
};

// As Session::activate: what must not fire becomes exactly 0, what is not a number stays so.
__device__ __forceinline__ float activate(const Activating& by, float a) {
    switch (by.activation) {
        case Activation::Relu:
        case Activation::DRelu:
            a = a <= 0 ? 0 : a;
            break;
        case Activation::Relu2:
            a = a <= 0 ? 0 : a * a;
            break;
        case Activation::FatRelu:
            return a <= by.threshold ? 0 : a;
        case Activation::Silu:
            a = a / (1 + expf(-a));
            break;
    }
    return by.cut && fabsf(a) < by.threshold ? 0 : a;
}

__device__ __forceinline__ float apply_up(const Activating& by, float a, float up) {
    return a * (by.activation == Activation::DRelu && up <= 0 ? 0 : up);
}

struct Counts {
    unsigned long long computed, active, fired, asked;
};

// The same of a segment.
struct alignas(8) Tally {
    uint16_t computed, active, fired, asked;
};

struct Choosing {
    CardRows select, up, predictor;  // up: no data where plain
    const float *select_bias, *up_bias, *predictor_bias;
    uint32_t n;  // neurons
    uint32_t always;
    bool asks, dense;
    Activating activating;
    Vec x, rank;
    uint32_t per_warp;  // neurons that a warp computes: a block's are a segment
    uint32_t* ids;      // (n,) those of a segment that fire, from its first place on
    float* h;           // (n,) theirs
    Tally* tallies;     // (n_segments,)
    uint32_t* n_ended;  // blocks that are done: 0 before and after
    uint32_t* starts;   // (n_segments + 1,) neurons that fire in the segments before
    Counts* counts;
};
constexpr uint32_t MAX_PER_WARP = THREADS / WARPS;  // a thread a neuron of the segment when the list is made

enum : uint32_t { ASKED = 1, COMPUTED = 2, ACTIVE = 4, FIRED = 8 };

// One neuron, by a whole warp: what was done for it, and its h.
__device__ __forceinline__ uint32_t choose(const Choosing& f, uint32_t i, uint32_t lane, float& h) {
    uint32_t did = 0;
    if (f.asks && i >= f.always) {
        did |= ASKED;
        const float forecast = dot_row(f.predictor, i - f.always, f.rank, lane) + f.predictor_bias[i - f.always];
        if (forecast < 0) return did;  // what is no number lets through
    }
    h = activate(f.activating, dot_row(f.select, i, f.x, lane) + (f.select_bias ? f.select_bias[i] : 0.0f));
    did |= COMPUTED;
    if (!(h != 0) && !f.dense) return did;
    if (f.up.data) h = apply_up(f.activating, h, dot_row(f.up, i, f.x, lane) + (f.up_bias ? f.up_bias[i] : 0.0f));
    return did | ACTIVE | (h != 0 ? uint32_t{FIRED} : 0u);
}

// Whether all other blocks are done: then what their first threads wrote is seen by all threads of this one.
__device__ __forceinline__ bool ends_last(uint32_t* n_ended) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(n_ended, 1u) == gridDim.x - 1;
        if (last) *n_ended = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

__device__ __forceinline__ Tally tally_of(const Tally* tallies, uint32_t segment) {
    const auto bits = __ldcg(reinterpret_cast<const unsigned long long*>(tallies + segment));  // others wrote it
    Tally tally;
    memcpy(&tally, &bits, sizeof(tally));
    return tally;
}

// The segments' beginnings, and the layer's counts, by one block.
__device__ __forceinline__ void sum_tallies(const Choosing& f) {
    __shared__ uint32_t sums[WARPS];
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n = gridDim.x;
    const uint32_t each = (n + THREADS - 1) / THREADS, begin = min(n, threadIdx.x * each), end = min(n, begin + each);
    int computed = 0, active = 0, fired = 0, asked = 0;
#pragma unroll 4
    for (uint32_t s = begin; s < end; s++) {
        const Tally tally = tally_of(f.tallies, s);
        computed += tally.computed, active += tally.active, fired += tally.fired, asked += tally.asked;
    }
    uint32_t sum = fired;  // inclusive in the warp
    for (uint32_t by = 1; by < WARP; by *= 2) {
        const uint32_t other = __shfl_up_sync(ALL, sum, by);
        if (lane >= by) sum += other;
    }
    if (lane == WARP - 1) sums[warp] = sum;
    computed = warp_sum(computed), active = warp_sum(active), asked = warp_sum(asked);
    __syncthreads();
    uint32_t at = sum - fired;
    for (uint32_t w = 0; w < warp; w++) at += sums[w];
    for (uint32_t s = begin; s < end; s++) {
        f.starts[s] = at;
        at += tally_of(f.tallies, s).fired;
    }
    if (threadIdx.x == THREADS - 1) {
        f.starts[n] = at;
        f.counts->fired += at;
    }
    if (lane != 0) return;
    atomicAdd(&f.counts->computed, (unsigned long long)computed);  // whole numbers: any order gives the same
    atomicAdd(&f.counts->active, (unsigned long long)active);
    atomicAdd(&f.counts->asked, (unsigned long long)asked);
}

// A warp a neuron, or some: its predictor row where asked, its deciding row where let through, its up row where that
// fires. Then the block's firing neurons become a list, in order; the last block says where each list begins.
__global__ void __launch_bounds__(THREADS) choose_neurons(Choosing f) {
    __shared__ float hs[THREADS];
    __shared__ uint32_t dids[THREADS], before[WARPS];
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, segment = WARPS * f.per_warp;
    const uint32_t first = blockIdx.x * segment;
#pragma unroll 1  // of more than one at a time registers spill
    for (uint32_t k = 0; k < f.per_warp; k++) {
        const uint32_t place = warp * f.per_warp + k, i = first + place;
        float h = 0;
        const uint32_t did = i < f.n ? choose(f, i, lane, h) : 0;
        if (lane == 0) hs[place] = h, dids[place] = did;
    }
    __syncthreads();
    const uint32_t did = threadIdx.x < segment ? dids[threadIdx.x] : 0;
    const uint32_t mask = __ballot_sync(ALL, did & FIRED);
    if (lane == 0) before[warp] = __popc(mask);
    const int n_asked = __syncthreads_count(did & ASKED), n_computed = __syncthreads_count(did & COMPUTED);
    const int n_active = __syncthreads_count(did & ACTIVE), n_fired = __syncthreads_count(did & FIRED);
    if (did & FIRED) {
        uint32_t at = first + __popc(mask & ((1u << lane) - 1));
        for (uint32_t w = 0; w < warp; w++) at += before[w];
        f.ids[at] = first + threadIdx.x;
        f.h[at] = hs[threadIdx.x];
    }
    if (threadIdx.x == 0)
        f.tallies[blockIdx.x] = {uint16_t(n_computed), uint16_t(n_active), uint16_t(n_fired), uint16_t(n_asked)};
    if (ends_last(f.n_ended)) sum_tallies(f);
}

constexpr uint32_t MAX_SEGMENTS = 4096;  // whose beginnings fit into shared memory

struct Adding {
    CardRows down;
    uint32_t n_segments, segment;  // neurons of a segment
    const uint32_t *ids, *starts;  // as choose_neurons left them
    const float* h;
    float* parts;  // (gridDim.y, down.n)
};

// The last segment that starts at or before the k-th firing neuron and is not empty: binary search.
__device__ __forceinline__ uint32_t segment_of(const uint32_t* starts, uint32_t n_segments, uint32_t k) {
    uint32_t lo = 0, hi = n_segments;
    while (hi - lo > 1) {
        const uint32_t mid = (lo + hi) / 2;
        if (starts[mid] <= k)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

template <Type T>
constexpr uint32_t TILE_COLUMNS = WARP * PER_PIECE<T>;  // of an add_down block: 512 bytes of quants in a row

// Bytes of shared memory: the beginnings of segments, then the warps' sums in their place.
template <Type T>
constexpr uint32_t adding_bytes(uint32_t n_segments) {
    const uint32_t starts = (n_segments + 1) * uint32_t(sizeof(uint32_t));
    const uint32_t sums = WARPS * PER_PIECE<T> * (WARP + 1) * uint32_t(sizeof(float));
    return starts > sums ? starts : sums;
}

// parts[blockIdx.y] = sum of h * down over an equal share of the firing neurons, columns of tile blockIdx.x. A lane
// has one piece of the columns, a warp every 8th neuron of the share.
template <Type T>
__global__ void __launch_bounds__(THREADS) add_down(Adding a) {
    constexpr uint32_t E = PER_PIECE<T>, PAD = WARP + 1, AT_ONCE = 4;
    __shared__ uint32_t ids[THREADS];
    __shared__ float hs[THREADS];
    auto* starts = static_cast<uint32_t*>(dynamic_shared());
    for (uint32_t s = threadIdx.x; s <= a.n_segments; s += THREADS) starts[s] = a.starts[s];
    __syncthreads();
    const uint64_t total = starts[a.n_segments];
    const auto begin = uint32_t(total * blockIdx.y / gridDim.y), end = uint32_t(total * (blockIdx.y + 1) / gridDim.y);
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, p = blockIdx.x * WARP + lane;
    const bool has_piece = p < pieces_of<T>(a.down.n);
    float acc[E] = {};
    for (uint32_t round = begin; round < end; round += THREADS) {
        __syncthreads();
        if (round + threadIdx.x < end) {
            const uint32_t k = round + threadIdx.x, s = segment_of(starts, a.n_segments, k);
            const uint32_t at = s * a.segment + (k - starts[s]);
            ids[threadIdx.x] = a.ids[at];
            hs[threadIdx.x] = a.h[at];
        }
        __syncthreads();
        const uint32_t n = min(THREADS, end - round);
        if (!has_piece) continue;
        for (uint32_t k0 = warp; k0 < n; k0 += AT_ONCE * WARPS) {
            uint4 w[AT_ONCE];
            float h[AT_ONCE];
#pragma unroll
            for (uint32_t r = 0; r < AT_ONCE; r++) {
                const uint32_t k = min(k0 + r * WARPS, n - 1);
                const uint8_t* row = a.down.row(ids[k]);
                w[r] = load_weights(row + p * PIECE_BYTES);
                h[r] = hs[k] * scale_of<T>(row, a.down.n, p);
            }
#pragma unroll
            for (uint32_t r = 0; r < AT_ONCE; r++) {
                if (k0 + r * WARPS >= n) break;
                float piece[E];
                expand_piece<T>(w[r], piece);
#pragma unroll
                for (uint32_t i = 0; i < E; i++) acc[i] = fmaf(h[r], piece[i], acc[i]);
            }
        }
    }
    __syncthreads();                                     // starts have been read
    auto* sums = static_cast<float*>(dynamic_shared());  // (WARPS, E, PAD): no two lanes in one bank
#pragma unroll
    for (uint32_t i = 0; i < E; i++) sums[(warp * E + i) * PAD + lane] = acc[i];
    __syncthreads();
    for (uint32_t c = threadIdx.x; c < TILE_COLUMNS<T>; c += THREADS) {
        const uint32_t column = blockIdx.x * TILE_COLUMNS<T> + c;
        float sum = 0;
        for (uint32_t w = 0; w < WARPS; w++) sum += sums[(w * E + c % E) * PAD + c / E];
        if (column < a.down.n) a.parts[uint64_t(blockIdx.y) * a.down.n + column] = sum;
    }
}

}  // namespace pi::card
