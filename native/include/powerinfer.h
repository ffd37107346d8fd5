/* powerinfer: the native engine's whole interface. Plain C, token ids only, no text, no I/O but the artifact.
 *
 * Every call that can fail returns a pi_status; pi_last_error() has the message of the calling thread's last failure.
 * Nothing throws across this header, prints, or runs a program. A handle belongs to one thread at a time.
 * Structs carry their size in `struct_size`, set by the caller, so that they can grow. */
#ifndef POWERINFER_H
#define POWERINFER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define PI_API __declspec(dllexport)
#else
#define PI_API __attribute__((visibility("default")))
#endif

#define PI_ABI_VERSION 6u

typedef enum {
    PI_OK = 0,
    PI_ERROR_ARGUMENT = 1,    /* a call's arguments are out of range */
    PI_ERROR_IO = 2,          /* the file cannot be opened or read */
    PI_ERROR_TRUNCATED = 3,   /* the file ends too early */
    PI_ERROR_MALFORMED = 4,   /* the file breaks the format's rules */
    PI_ERROR_MISMATCH = 5,    /* a tensor or key is missing or has the wrong type or shape */
    PI_ERROR_UNSUPPORTED = 6, /* valid, but not something this engine runs */
    PI_ERROR_MEMORY = 7,      /* an allocation failed */
    PI_ERROR_INTERNAL = 8     /* a defect of the engine */
} pi_status;

/* How a layer chooses its neurons. AUTO is what the artifact says, layer by layer. */
typedef enum {
    PI_MODE_AUTO = 0,     /* gate or predictor, as the artifact's layers say */
    PI_MODE_DENSE = 1,    /* all neurons */
    PI_MODE_GATE = 2,     /* the gate row of every neuron, up and down where it fires: exact */
    PI_MODE_PREDICTOR = 3 /* gate rows only of what the predictor lets through; AUTO where a layer has none */
} pi_mode;

typedef struct pi_model pi_model;     /* weights, read only; may be shared by sessions */
typedef struct pi_session pi_session; /* KV cache, scratch, threads, sampler state */

typedef struct {
    uint32_t struct_size;
    uint32_t n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim, n_vocab, n_ctx_train;
    uint64_t weight_bytes; /* all tensors */
    /* as held in memory: tensors (with a disk tier in whole pages, and only what stays), the disk tier's cache of
     * neurons, its tables and the buffers that reads arrive in */
    uint64_t resident_bytes, cache_bytes, disk_bytes;
    uint64_t card_bytes, card_context_bytes; /* weights on the card; what it takes before anything is stored there */
} pi_model_info;

/* For a model that is larger than memory: some neurons stay in the file and are read when a token asks for them. */
typedef struct {
    uint32_t struct_size;
    uint32_t reader;    /* 0: the best here; 1: io_uring; 2: threads */
    uint32_t n_slots;   /* neurons of each layer that a cache can hold beside the resident ones */
    uint32_t n_transit; /* neurons that one layer can read for one token; where it asks for more, it reads all */
    uint32_t n_layer;
    const uint32_t* n_resident; /* [n_layer]: the first neurons of each layer, which stay in memory, or on a card as far
                                 * as they are there; at most n_ff */
} pi_disk_params;

typedef enum {
    PI_DEVICE_CUDA = 1, /* the first card, through the library that holds the CUDA part */
    PI_DEVICE_HOST = 2  /* a thread with memory of its own, in place of a card: for tests */
} pi_device;

/* What lies on a card: there, and not in the processor's memory. */
typedef struct {
    uint32_t struct_size;
    uint32_t device;    /* pi_device */
    uint32_t head;      /* not 0: the output head and its norm */
    uint32_t lend_from; /* batches of a prompt (of 256 tokens at most) of at least so many are computed there with all
                         * neurons, copied for the time; 0: none is */
    uint64_t budget;    /* bytes there, everything counted: more is an error; 0: no limit */
    uint32_t n_layer;
    const uint8_t* dense;      /* [n_layer] not 0: the dense block: norms, attention with its KV cache, predictor_in */
    const uint32_t* n_neurons; /* [n_layer] its first neurons: one of pi_chunk_bounds; of experts 0 */
} pi_card_params;

typedef struct {
    uint32_t struct_size;
    char name[128];
    uint64_t total_bytes, free_bytes, context_bytes; /* context: what it takes before anything is stored there */
} pi_card_info;

/* What pi_measure_card measures. */
typedef enum {
    PI_CARD_READ = 0,   /* bytes per second of reads there, of rows as pi_measure_rows' */
    PI_CARD_COPY = 1,   /* bytes per second from the processor's memory to there */
    PI_CARD_LAUNCH = 2, /* seconds of one small step behind another */
    PI_CARD_MERGE = 3   /* seconds: row_bytes there, one step, as many back and seen */
} pi_card_measure;

typedef struct {
    uint32_t struct_size;
    uint32_t n_ctx;     /* positions the KV cache holds; 1 .. n_ctx_train */
    uint32_t n_threads; /* 1 .. 256 */
    uint32_t mode;      /* pi_mode */
    uint32_t uncut;     /* not 0: ignore the activation thresholds (the model before it was cut) */
    uint32_t kernels;   /* 0: the best for this processor; 1: scalar; 2: AVX2; 3: AVX-512 */
} pi_session_params;

/* What was done since the session was made or pi_session_reset_stats. Bytes are weight and KV bytes that were read. */
typedef struct {
    uint32_t struct_size;
    uint64_t n_decode, n_prefill; /* tokens */
    uint64_t bytes_decode;        /* read by decoding, all parts */
    uint64_t neurons_active;      /* fired, decode, over tokens and layers */
    uint64_t neurons_computed;    /* gate rows computed, decode */
    uint64_t neurons_total;       /* n_ff over tokens and layers, decode */
    /* seconds of decode by part, the mean over the threads; sync: waiting for one another; other: done by one alone */
    double seconds_attention, seconds_predictor, seconds_gate, seconds_updown, seconds_head, seconds_other,
        seconds_sync;
    uint64_t bytes_attention, bytes_predictor, bytes_gate, bytes_updown, bytes_head;
    /* With a disk tier. seconds_disk: waiting for it, of decode. Neurons of layers that have some on disk, as decode
     * asked for them, by where they were; reads and bytes of these reads, and the bytes of what was read in sequence:
     * whole layers, and what fills the cache. ahead: neurons that were read before their layer asked, and those of
     * them that it then asked for (they count as from disk). */
    double seconds_disk;
    uint64_t neurons_prefix, neurons_cache, neurons_disk;
    uint64_t disk_reads, disk_bytes, stream_bytes;
    uint64_t neurons_ahead, neurons_ahead_asked;
    /* With a card, of decode. seconds_card: waiting for it. card_neurons: whose deciding row was computed there, and
     * those of them that fired (neurons_computed and neurons_active count both sides); card_read_bytes: weights and KV
     * that were read there; card_transfers, card_waits, card_bytes: vectors that crossed in either direction, times
     * that one side waited for the other, and bytes that crossed. */
    double seconds_card;
    uint64_t card_neurons, card_neurons_fired, card_read_bytes, card_transfers, card_waits, card_bytes;
} pi_stats;

/* One layer's selection against the truth, counted by pi_score (neuron occurrences over tokens). */
typedef struct {
    uint64_t n_tokens, n_true, n_predicted, n_hit;
} pi_layer_score;

typedef struct {
    uint32_t struct_size;
    float temperature;    /* 0: greedy */
    uint32_t top_k;       /* 0: off */
    float top_p;          /* 1: off */
    float min_p;          /* 0: off */
    float repeat_penalty; /* 1: off */
    uint32_t repeat_last_n;
} pi_sampling;

PI_API uint32_t pi_abi_version(void);
PI_API const char* pi_last_error(void);        /* valid until the thread's next failing call */
PI_API const char* pi_kernels(uint32_t which); /* name of the kernels that `kernels = which` selects, or NULL */
PI_API void pi_set_log(void (*log)(int level, const char* message, void* user), void* user);

/* Checks the whole header: the container, the keys, every tensor that they demand. Reads no tensor data. */
PI_API pi_status pi_check(const char* path);
/* disk: NULL where all of the model lies in memory; card: NULL where nothing lies on a card. */
PI_API pi_status pi_model_open(const char* path, const pi_disk_params* disk, const pi_card_params* card,
                               pi_model** out);
PI_API void pi_model_close(pi_model* model);
PI_API pi_status pi_model_get_info(const pi_model* model, pi_model_info* out);

PI_API pi_status pi_session_open(pi_model* model, const pi_session_params* params, pi_session** out);
PI_API void pi_session_close(pi_session* session);
PI_API pi_status pi_session_bytes(const pi_session* session, uint64_t* kv_bytes, uint64_t* scratch_bytes);
PI_API pi_status pi_session_card_bytes(const pi_session* session, uint64_t* kv_bytes, uint64_t* scratch_bytes);

/* Appends tokens to the context through the matrix-matrix path (all neurons). logits: [n_vocab] of the last, or NULL.
 */
PI_API pi_status pi_prefill(pi_session* session, const int32_t* tokens, size_t n, float* logits);
/* Appends one token through the sparse path; the logits stay in the session for pi_sample, and in `logits` if given. */
PI_API pi_status pi_decode(pi_session* session, int32_t token, float* logits);
/* As pi_prefill, but only the neurons that the session's mode selects contribute, and logits are [n, n_vocab].
 * scores: [n_layer] added to, or NULL. */
PI_API pi_status pi_score(pi_session* session, const int32_t* tokens, size_t n, float* logits, pi_layer_score* scores);
/* Forgets everything from position n on. */
PI_API pi_status pi_truncate(pi_session* session, size_t n);
PI_API pi_status pi_position(const pi_session* session, size_t* n);

/* Seeds the sampler: same seed, same calls, same tokens. */
PI_API pi_status pi_seed(pi_session* session, uint64_t seed);
/* Draws the next token from the last logits. recent: the ids that repeat_penalty looks at, oldest first. */
PI_API pi_status pi_sample(pi_session* session, const pi_sampling* sampling, const int32_t* recent, size_t n_recent,
                           int32_t* token);

PI_API pi_status pi_session_get_stats(pi_session* session, pi_stats* out);
PI_API pi_status pi_session_reset_stats(pi_session* session);

/* Measures memory with n_threads: plain reads in sequence, the most that it gives. Returns bytes per second: of several
 * ways to ask for what comes next the best, of each the median of `repeats`. */
PI_API pi_status pi_measure_memory(uint32_t n_threads, uint64_t buffer_bytes, uint32_t repeats, double* bytes_per_s);
/* The same as the engine reads weights: Q4_0 rows of row_bytes, a multiple of 18, of which one in `stride_rows` is
 * taken (1: all, in sequence). */
PI_API pi_status pi_measure_rows(uint32_t n_threads, uint64_t buffer_bytes, uint64_t row_bytes, uint32_t stride_rows,
                                 uint32_t repeats, double* bytes_per_s);
/* Measures the disk tier's reader on an open file, for so many seconds: reads of read_bytes (whole blocks of the
 * device; 4096 always will do) at random places, n_at_once in one go. Returns bytes per second. */
PI_API pi_status pi_measure_file(int fd, uint32_t read_bytes, uint32_t n_at_once, double seconds, double* bytes_per_s);

/* Where a layer's neurons can be divided between processor and card: bounds of the ranges whose sums are made on their
 * own, from 0 to n_ff (of experts all stay with the processor). frequency: [n_ff] as the artifact has it. bounds: room
 * for PI_MAX_BOUNDS. */
#define PI_MAX_BOUNDS 25
PI_API pi_status pi_chunk_bounds(const float* frequency, uint32_t n_ff, uint32_t* bounds, uint32_t* n_bounds);
PI_API pi_status pi_card_describe(uint32_t device, pi_card_info* out);
/* The median of several. what: a pi_card_measure; the others as in pi_measure_rows. */
PI_API pi_status pi_measure_card(uint32_t device, uint32_t what, uint64_t buffer_bytes, uint64_t row_bytes,
                                 uint32_t stride_rows, double* out);

#ifdef __cplusplus
}
#endif
#endif
