// The C interface: checks arguments, turns exceptions into status codes. No logic.
#include <sys/stat.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "device.h"
#include "disk.h"
#include "measure.h"
#include "model.h"
#include "powerinfer.h"
#include "session.h"

struct pi_model {
    pi::Model model;
};

struct pi_session {
    pi::Session session;
};

namespace {

thread_local std::string last_error;
void (*log_callback)(int, const char*, void*) = nullptr;
void* log_user = nullptr;

pi_status fail(pi_status status, const char* message) {
    try {
        last_error = message;
    } catch (...) {
        last_error.clear();
    }
    if (log_callback) log_callback(1, message, log_user);
    return status;
}

template <class F>
pi_status guarded(F&& f) noexcept {
    try {
        f();
        return PI_OK;
    } catch (const pi::Error& e) {
        return fail(e.status, e.what());
    } catch (const std::bad_alloc&) {
        return fail(PI_ERROR_MEMORY, "out of memory");
    } catch (const std::exception& e) {
        return fail(PI_ERROR_INTERNAL, e.what());
    } catch (...) {
        return fail(PI_ERROR_INTERNAL, "unknown failure");
    }
}

void require(bool ok, const char* what) {
    if (!ok) throw pi::Error(PI_ERROR_ARGUMENT, what);
}

// Copies what the caller's version of the struct holds.
template <class T>
void copy_out(const T& value, T* out) {
    uint32_t size = out->struct_size;
    require(size >= sizeof(uint32_t) && size <= sizeof(T), "struct_size: expected the size of a known version");
    std::memcpy(out, &value, size);
    out->struct_size = size;
}

void check_card(const pi_card_params& card) {
    require(card.struct_size == sizeof(pi_card_params), "struct_size: expected that of pi_card_params");
    require(card.dense && card.n_neurons, "card: expected dense and n_neurons, found NULL");
    require(card.device == PI_DEVICE_CUDA || card.device == PI_DEVICE_HOST, "card: expected a pi_device");
}

std::unique_ptr<pi::Device> open_device(uint32_t device) {
    require(device == PI_DEVICE_CUDA || device == PI_DEVICE_HOST, "device: expected a pi_device");
    return device == PI_DEVICE_HOST ? pi::host_device() : pi::cuda_device();
}

double measure_card(pi::Device& device, uint32_t what, uint64_t buffer_bytes, uint64_t row_bytes, uint32_t stride) {
    switch (what) {
        case PI_CARD_READ:
            return device.read_rate(buffer_bytes, row_bytes, stride);
        case PI_CARD_COPY:
            return device.copy_rate();
        case PI_CARD_LAUNCH:
            return device.launch_seconds();
        default:
            return device.merge_seconds(row_bytes / sizeof(float));
    }
}

void check_sampling(const pi_sampling& s) {
    require(std::isfinite(s.temperature) && s.temperature >= 0, "temperature: expected a finite number of at least 0");
    require(s.top_p > 0 && s.top_p <= 1, "top_p: expected more than 0 and at most 1");
    require(s.min_p >= 0 && s.min_p <= 1, "min_p: expected 0 to 1");
    require(std::isfinite(s.repeat_penalty) && s.repeat_penalty > 0,
            "repeat_penalty: expected a finite number above 0");
}

void check_measure(uint32_t n_threads, uint32_t repeats, const double* bytes_per_s) {
    require(bytes_per_s, "bytes_per_s: expected a place for the result, found NULL");
    require(n_threads >= 1 && n_threads <= 256, "n_threads: expected 1 to 256");
    require(repeats >= 1 && repeats <= 1000, "repeats: expected 1 to 1000");
}

}  // namespace

extern "C" {

uint32_t pi_abi_version(void) { return PI_ABI_VERSION; }

const char* pi_last_error(void) { return last_error.c_str(); }

const char* pi_kernels(uint32_t which) {
    const pi::Ops* ops = pi::choose_ops(which);
    return ops ? ops->name : nullptr;
}

void pi_set_log(void (*log)(int, const char*, void*), void* user) {
    log_callback = log;
    log_user = user;
}

pi_status pi_check(const char* path) {
    return guarded([&] {
        require(path, "path: expected one, found NULL");
        pi::Model model(path);
    });
}

pi_status pi_model_open(const char* path, const pi_disk_params* disk, const pi_card_params* card, pi_model** out) {
    return guarded([&] {
        require(path && out, "path and out: expected both, found NULL");
        require(!disk || disk->struct_size == sizeof(pi_disk_params), "struct_size: expected that of pi_disk_params");
        constexpr uint32_t MOST = 1u << 24;
        require(!disk || (disk->n_resident && disk->reader <= 2 && disk->n_slots <= MOST && disk->n_transit <= MOST),
                "disk: expected n_resident, a reader from 0 to 2 and at most 2^24 slots and neurons in transit");
        auto model = std::unique_ptr<pi_model>(new pi_model{pi::Model(path)});
        if (card) check_card(*card);
        model->model.load(disk, card);
        *out = model.release();
    });
}

void pi_model_close(pi_model* model) { delete model; }

pi_status pi_model_get_info(const pi_model* model, pi_model_info* out) {
    return guarded([&] {
        require(model && out, "model and out: expected both, found NULL");
        const pi::Model& m = model->model;
        const pi::Config& c = m.config;
        pi_model_info info{sizeof(pi_model_info), c.n_layer,  c.n_embd,  c.n_ff,         c.n_head,
                           c.n_head_kv,           c.head_dim, c.n_vocab, c.n_ctx,        m.weight_bytes,
                           m.weight_bytes,        0,          0,         m.device_bytes, m.device_context};
        for (auto [begin, end] : m.holes()) info.resident_bytes -= end - begin;
        if (m.disk) {
            info.resident_bytes = m.disk->weights_bytes();
            info.cache_bytes = m.disk->cache_bytes();
            info.disk_bytes = m.disk->beside_bytes();
        }
        copy_out(info, out);
    });
}

pi_status pi_session_open(pi_model* model, const pi_session_params* params, pi_session** out) {
    return guarded([&] {
        require(model && params && out, "model, params and out: expected all, found NULL");
        require(params->struct_size == sizeof(pi_session_params), "struct_size: expected that of pi_session_params");
        require(params->n_ctx >= 1 && params->n_ctx <= model->model.config.n_ctx,
                "n_ctx: expected 1 to the model's context length");
        require(params->n_threads >= 1 && params->n_threads <= 256, "n_threads: expected 1 to 256");
        require(params->mode <= PI_MODE_PREDICTOR, "mode: expected a pi_mode");
        *out = new pi_session{pi::Session(model->model, *params)};
    });
}

void pi_session_close(pi_session* session) { delete session; }

pi_status pi_session_bytes(const pi_session* session, uint64_t* kv_bytes, uint64_t* scratch_bytes) {
    return guarded([&] {
        require(session && kv_bytes && scratch_bytes, "session and outputs: expected all, found NULL");
        *kv_bytes = session->session.kv_bytes();
        *scratch_bytes = session->session.scratch_bytes();
    });
}

pi_status pi_session_card_bytes(const pi_session* session, uint64_t* kv_bytes, uint64_t* scratch_bytes) {
    return guarded([&] {
        require(session && kv_bytes && scratch_bytes, "session and outputs: expected all, found NULL");
        *kv_bytes = session->session.card_kv_bytes();
        *scratch_bytes = session->session.card_scratch_bytes();
    });
}

pi_status pi_prefill(pi_session* session, const int32_t* tokens, size_t n, float* logits) {
    return guarded([&] {
        require(session && tokens && n > 0, "session and tokens: expected both and at least one token");
        session->session.prefill(tokens, n, logits);
    });
}

pi_status pi_decode(pi_session* session, int32_t token, float* logits) {
    return guarded([&] {
        require(session, "session: expected one, found NULL");
        session->session.decode(token, logits);
    });
}

pi_status pi_score(pi_session* session, const int32_t* tokens, size_t n, float* logits, pi_layer_score* scores) {
    return guarded([&] {
        require(session && tokens && n > 0 && logits,
                "session, tokens and logits: expected all and at least one token");
        session->session.score(tokens, n, logits, scores);
    });
}

pi_status pi_truncate(pi_session* session, size_t n) {
    return guarded([&] {
        require(session, "session: expected one, found NULL");
        session->session.truncate(n);
    });
}

pi_status pi_position(const pi_session* session, size_t* n) {
    return guarded([&] {
        require(session && n, "session and n: expected both, found NULL");
        *n = session->session.position;
    });
}

pi_status pi_seed(pi_session* session, uint64_t seed) {
    return guarded([&] {
        require(session, "session: expected one, found NULL");
        session->session.sampler.seed(seed);
    });
}

pi_status pi_sample(pi_session* session, const pi_sampling* sampling, const int32_t* recent, size_t n_recent,
                    int32_t* token) {
    return guarded([&] {
        require(session && sampling && token, "session, sampling and token: expected all, found NULL");
        require(sampling->struct_size == sizeof(pi_sampling), "struct_size: expected that of pi_sampling");
        require(recent || n_recent == 0, "recent: expected the ids, found NULL");
        check_sampling(*sampling);
        pi::Session& s = session->session;
        require(s.has_logits, "nothing to sample from: no token was run since the session was opened or truncated");
        for (size_t i = 0; i < n_recent; i++)
            require(recent[i] >= 0 && static_cast<uint32_t>(recent[i]) < s.config.n_vocab,
                    "recent: a token id is out of range");
        *token = s.sampler.sample(s.logits.data(), s.config.n_vocab, *sampling, recent, n_recent);
    });
}

pi_status pi_session_get_stats(pi_session* session, pi_stats* out) {
    return guarded([&] {
        require(session && out, "session and out: expected both, found NULL");
        pi_stats stats = session->session.read_stats();
        stats.struct_size = sizeof(pi_stats);
        copy_out(stats, out);
    });
}

pi_status pi_session_reset_stats(pi_session* session) {
    return guarded([&] {
        require(session, "session: expected one, found NULL");
        session->session.reset_stats();
    });
}

pi_status pi_measure_memory(uint32_t n_threads, uint64_t buffer_bytes, uint32_t repeats, double* bytes_per_s) {
    return guarded([&] {
        check_measure(n_threads, repeats, bytes_per_s);
        require(buffer_bytes >= 4096 && buffer_bytes <= (uint64_t{1} << 40), "buffer_bytes: expected 4 KiB to 1 TiB");
        *bytes_per_s = pi::measure_memory(n_threads, buffer_bytes, repeats);
    });
}

pi_status pi_measure_rows(uint32_t n_threads, uint64_t buffer_bytes, uint64_t row_bytes, uint32_t stride_rows,
                          uint32_t repeats, double* bytes_per_s) {
    return guarded([&] {
        check_measure(n_threads, repeats, bytes_per_s);
        require(buffer_bytes <= (uint64_t{1} << 40) && stride_rows >= 1 && row_bytes > 0 && row_bytes % 18 == 0 &&
                    row_bytes <= buffer_bytes / stride_rows && buffer_bytes / row_bytes <= UINT32_MAX,
                "row_bytes: expected a multiple of 18 and one picked row in the buffer; stride_rows: at least 1");
        *bytes_per_s = pi::measure_rows(n_threads, buffer_bytes, row_bytes, stride_rows, repeats);
    });
}

pi_status pi_measure_file(int fd, uint32_t read_bytes, uint32_t n_at_once, double seconds, double* bytes_per_s) {
    return guarded([&] {
        require(bytes_per_s, "bytes_per_s: expected a place for the result, found NULL");
        require(read_bytes >= 1 && read_bytes <= (1u << 26) && n_at_once >= 1 && n_at_once <= 4096,
                "read_bytes: expected 1 byte to 64 MiB; n_at_once: 1 to 4096");
        require(seconds >= 0 && seconds <= 60, "seconds: expected 0 to 60");
        struct stat info{};
        require(fstat(fd, &info) == 0 && info.st_size >= read_bytes, "fd: expected a file of at least read_bytes");
        *bytes_per_s = pi::measure_file(fd, static_cast<uint64_t>(info.st_size), read_bytes, n_at_once, seconds);
    });
}

pi_status pi_chunk_bounds(const float* frequency, uint32_t n_ff, uint32_t* bounds, uint32_t* n_bounds) {
    return guarded([&] {
        require(frequency && bounds && n_bounds, "frequency and outputs: expected all, found NULL");
        require(n_ff >= 1 && n_ff <= (1u << 24), "n_ff: expected 1 to 2^24");
        std::vector<uint32_t> found = pi::chunk_bounds(frequency, n_ff, 1.0);
        static_assert(PI_MAX_BOUNDS == pi::MAX_CHUNKS + 1);
        std::copy(found.begin(), found.end(), bounds);
        *n_bounds = static_cast<uint32_t>(found.size());
    });
}

pi_status pi_card_describe(uint32_t device, pi_card_info* out) {
    return guarded([&] {
        require(out && out->struct_size == sizeof(pi_card_info), "struct_size: expected that of pi_card_info");
        pi::DeviceInfo found = open_device(device)->info();
        pi_card_info info{sizeof(pi_card_info), {}, found.total, found.free, found.context};
        std::strncpy(info.name, found.name.c_str(), sizeof(info.name) - 1);
        *out = info;
    });
}

pi_status pi_measure_card(uint32_t device, uint32_t what, uint64_t buffer_bytes, uint64_t row_bytes,
                          uint32_t stride_rows, double* out) {
    return guarded([&] {
        require(out, "out: expected a place for the result, found NULL");
        require(what <= PI_CARD_MERGE, "what: expected a pi_card_measure");
        bool reads = what == PI_CARD_READ;
        require(!reads || (stride_rows >= 1 && row_bytes >= 128 && row_bytes % 128 == 0 &&
                           buffer_bytes <= (uint64_t{1} << 36) && row_bytes <= buffer_bytes / stride_rows),
                "row_bytes: expected a multiple of 128 and one picked row in the buffer of at most 64 GiB");
        require(what != PI_CARD_MERGE || (row_bytes >= 4 && row_bytes <= (1u << 20)),
                "row_bytes: expected 4 bytes to 1 MiB");
        *out = measure_card(*open_device(device), what, buffer_bytes, row_bytes, stride_rows);
    });
}

}  // extern "C"
