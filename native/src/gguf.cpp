#include "gguf.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

static_assert(std::endian::native == std::endian::little, "the artifact is little-endian and is used as stored");

namespace pi {
namespace {

constexpr size_t WINDOW = 1 << 16;  // bytes of the header held at a time

struct TypeTraits {
    Type type;
    const char* name;
    uint64_t elements, bytes;  // of a block
};
constexpr TypeTraits TYPES[] = {
    {Type::F32, "F32", 1, 4},     {Type::F16, "F16", 1, 2}, {Type::Q4_0, "Q4_0", 32, 18},
    {Type::Q8_0, "Q8_0", 32, 34}, {Type::I32, "I32", 1, 4},
};

const TypeTraits* find_type(uint32_t id) {
    for (const TypeTraits& t : TYPES)
        if (static_cast<uint32_t>(t.type) == id) return &t;
    return nullptr;
}

const TypeTraits& traits(Type type) {
    if (const TypeTraits* t = find_type(static_cast<uint32_t>(type))) return *t;
    throw Error(PI_ERROR_INTERNAL, "tensor type " + std::to_string(static_cast<uint32_t>(type)) + " has no traits");
}

// Bytes of a scalar value, 0 for what is none.
uint64_t scalar_bytes(uint32_t type) {
    constexpr uint8_t BYTES[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return type < sizeof BYTES ? BYTES[type] : 0;
}

bool is_signed(uint32_t type) { return type == 1 || type == 3 || type == 5 || type == 11; }

std::string str(uint64_t n) { return std::to_string(n); }

// A text from the file, fit for one line of a terminal.
std::string shown(std::string_view text) {
    constexpr char HEX[] = "0123456789abcdef";
    std::string out;
    for (unsigned char c : text) {
        if (c >= 0x20 && c < 0x7f)
            out += static_cast<char>(c);
        else
            (out += "\\x").append({HEX[c >> 4], HEX[c & 15]});
    }
    return out;
}

[[noreturn]] void malformed(std::string_view what, const std::string& message) {
    throw Error(PI_ERROR_MALFORMED, std::string(what) + ": " + message);
}

// Says of bytes fed in pieces whether they are UTF-8: shortest forms, no surrogates, up to U+10FFFF.
class Utf8 {
   public:
    bool feed(const uint8_t* bytes, size_t n) {
        for (size_t i = 0; i < n; ++i)
            if (!step(bytes[i])) return false;
        return true;
    }
    bool whole() const { return missing_ == 0; }

   private:
    bool step(uint8_t b) {
        if (missing_ > 0) {
            bool inside = low_ <= b && b <= high_;
            low_ = 0x80, high_ = 0xBF;
            --missing_;
            return inside;
        }
        if (b < 0x80) return true;
        if (b < 0xC2 || b > 0xF4) return false;
        missing_ = b < 0xE0 ? 1 : b < 0xF0 ? 2 : 3;
        if (b == 0xE0) low_ = 0xA0;
        if (b == 0xED) high_ = 0x9F;
        if (b == 0xF0) low_ = 0x90;
        if (b == 0xF4) high_ = 0x8F;
        return true;
    }

    int missing_ = 0;                   // bytes of the character still to come
    uint8_t low_ = 0x80, high_ = 0xBF;  // what the next of them may be
};

// Walks the header through a window; never steps past the end of the file or past MAX_HEADER.
class Cursor {
   public:
    explicit Cursor(const Source& source)
        : source_(source), window_(static_cast<size_t>(std::min<uint64_t>(WINDOW, source.n_bytes))) {}

    uint64_t position() const { return position_; }

    // Throws unless the header has n more bytes.
    void require(uint64_t n, std::string_view what) const {
        if (n > source_.n_bytes - position_)
            throw Error(PI_ERROR_TRUNCATED, std::string(what) + ": expected " + str(n) + " bytes at byte " +
                                                str(position_) + ", found the end of the file at byte " +
                                                str(source_.n_bytes));
        if (n > MAX_HEADER - position_)
            malformed(what, "expected a header of at most " + str(MAX_HEADER) + " bytes, found more");
    }

    template <class T>
    T number(std::string_view what) {
        require(sizeof(T), what);
        T value;
        std::memcpy(&value, take(sizeof(T)), sizeof(T));
        return value;
    }

    // Passes the next n bytes on in pieces; each piece is a multiple of 8 bytes long but the last.
    template <class F>
    void pieces(uint64_t n, std::string_view what, F use) {
        require(n, what);
        while (n > 0) {
            size_t piece = static_cast<size_t>(std::min<uint64_t>(n, WINDOW));
            use(take(piece), piece);
            n -= piece;
        }
    }

   private:
    // The next n <= WINDOW bytes, which are there; valid until the next call.
    const uint8_t* take(size_t n) {
        if (position_ < begin_ || position_ - begin_ > filled_ || filled_ - (position_ - begin_) < n) {
            begin_ = position_;
            filled_ = static_cast<size_t>(std::min<uint64_t>(WINDOW, source_.n_bytes - begin_));
            source_.read(source_.user, begin_, filled_, window_.data());
        }
        const uint8_t* bytes = window_.data() + (position_ - begin_);
        position_ += n;
        return bytes;
    }

    const Source& source_;
    std::vector<uint8_t> window_;
    uint64_t begin_ = 0, position_ = 0;
    size_t filled_ = 0;
};

// Reads the header's parts in their order in the file.
class Reader {
   public:
    explicit Reader(const Source& source) : in_(source) { gguf_.file_bytes = source.n_bytes; }

    Gguf read() {
        check_version();
        uint64_t n_tensors = count("number of tensors", MAX_TENSORS);
        uint64_t n_kv = count("number of metadata keys", MAX_KV);
        for (uint64_t i = 0; i < n_kv; ++i) read_pair();
        for (uint64_t i = 0; i < n_tensors; ++i) read_tensor();
        gguf_.data_offset = checked_align_up(in_.position(), alignment_, "header");
        place_tensors();
        return std::move(gguf_);
    }

   private:
    void check_version() {
        char magic[4];
        uint32_t word = in_.number<uint32_t>("magic");
        std::memcpy(magic, &word, 4);
        if (std::memcmp(magic, "GGUF", 4) != 0)
            malformed("magic", "expected a GGUF file, found one that begins with " + shown({magic, 4}));
        uint32_t version = in_.number<uint32_t>("version");
        if (version != 3) throw Error(PI_ERROR_UNSUPPORTED, "version: expected 3, found " + str(version));
    }

    // `of` says of the thing `what` which number it is.
    uint64_t count(std::string_view what, uint64_t limit, const char* of = "") {
        uint64_t n = in_.number<uint64_t>(what);
        if (n > limit) malformed(std::string(what) + of, "expected at most " + str(limit) + ", found " + str(n));
        return n;
    }

    // A length and that many bytes of UTF-8, copied to `out` (may be NULL) up to MAX_TEXT. Returns the length.
    uint64_t string(std::string_view what, uint64_t limit, std::string* out) {
        uint64_t n = count(what, limit, ": length");
        in_.require(n, what);
        uint64_t begin = in_.position();
        if (n > MAX_TEXT) out = nullptr;
        Utf8 utf8;
        in_.pieces(n, what, [&](const uint8_t* bytes, size_t size) {
            if (!utf8.feed(bytes, size)) malformed(what, "expected UTF-8, found other bytes after byte " + str(begin));
            if (out) out->append(reinterpret_cast<const char*>(bytes), size);
        });
        if (!utf8.whole()) malformed(what, "expected UTF-8, found a cut character before byte " + str(in_.position()));
        return n;
    }

    std::string name(std::string_view kind, uint64_t limit) {
        std::string what = std::string(kind) + " at byte " + str(in_.position());
        std::string text;
        if (string(what, limit, &text) == 0) malformed(what, "expected 1 to " + str(limit) + " bytes, found none");
        return text;
    }

    void read_pair() {
        std::string key = name("key", MAX_KEY), where = shown(key);
        if (gguf_.metadata.contains(key)) malformed(where, "expected each key once, found it twice");
        bool is_alignment = key == "general.alignment";
        Value value;
        value.type = in_.number<uint32_t>(where);
        if (is_alignment && value.type != UINT32)
            malformed(where, "expected a value of type 4 (uint32), found type " + str(value.type));
        read_value(where, &value);
        if (is_alignment) alignment_ = checked_alignment(value.bits);
        gguf_.metadata.emplace(std::move(key), std::move(value));
    }

    static uint64_t checked_alignment(uint64_t found) {
        if (found < MIN_ALIGNMENT || found > MAX_ALIGNMENT || !std::has_single_bit(found))
            malformed("general.alignment", "expected a power of two from " + str(MIN_ALIGNMENT) + " to " +
                                               str(MAX_ALIGNMENT) + ", found " + str(found));
        return found;
    }

    void read_value(const std::string& where, Value* value) {
        if (value->type == STRING)
            value->n = string(where, MAX_STRING, &value->text);
        else if (value->type == ARRAY)
            read_array(where, value);
        else if (scalar_bytes(value->type) != 0)
            value->bits = scalar(where, value->type);
        else
            malformed(where, "expected a value type from 0 to 12, found " + str(value->type));
    }

    uint64_t scalar(const std::string& where, uint32_t type) {
        switch (scalar_bytes(type)) {
            case 1: {
                uint8_t byte = in_.number<uint8_t>(where);
                if (type == BOOL) check_bools(where, &byte, 1);
                return is_signed(type) ? static_cast<uint64_t>(static_cast<int8_t>(byte)) : byte;
            }
            case 2: {
                uint16_t half = in_.number<uint16_t>(where);
                return is_signed(type) ? static_cast<uint64_t>(static_cast<int16_t>(half)) : half;
            }
            case 4: {
                uint32_t word = in_.number<uint32_t>(where);
                return is_signed(type) ? static_cast<uint64_t>(static_cast<int32_t>(word)) : word;
            }
            default:
                return in_.number<uint64_t>(where);
        }
    }

    static void check_bools(std::string_view where, const uint8_t* bytes, size_t n) {
        for (size_t i = 0; i < n; ++i)
            if (bytes[i] > 1) malformed(where, "expected booleans of 0 or 1, found " + str(bytes[i]));
    }

    void read_array(const std::string& where, Value* value) {
        uint32_t type = value->element_type = in_.number<uint32_t>(where);
        uint64_t size = scalar_bytes(type);
        if (type != STRING && size == 0)
            malformed(where, "expected an array of scalars or strings, found elements of type " + str(type));
        value->n = count(where, MAX_ARRAY, ": number of elements");
        if (type == STRING) return skip_strings(where, value->n);
        uint64_t bytes = checked_mul(value->n, size, where);
        in_.require(bytes, where);
        bool keep = size >= 4 && value->n <= MAX_NUMBERS;
        if (keep) value->numbers.reserve(static_cast<size_t>(value->n));
        in_.pieces(bytes, where, [&](const uint8_t* piece, size_t n) {
            if (type == BOOL) check_bools(where, piece, n);
            if (keep) append_numbers(type, piece, n, &value->numbers);
        });
    }

    void skip_strings(const std::string& where, uint64_t n) {
        in_.require(checked_mul(n, 8, where), where);  // the lengths alone
        for (uint64_t i = 0; i < n; ++i) string(where + "[" + str(i) + "]", MAX_STRING, nullptr);
    }

    static void append_numbers(uint32_t type, const uint8_t* bytes, size_t n, std::vector<double>* out) {
        auto append = [&]<class T>(T value) {
            for (size_t at = 0; at < n; at += sizeof value) {
                std::memcpy(&value, bytes + at, sizeof value);
                out->push_back(static_cast<double>(value));
            }
        };
        switch (type) {
            case UINT32:
                return append(uint32_t{});
            case INT32:
                return append(int32_t{});
            case FLOAT32:
                return append(float{});
            case UINT64:
                return append(uint64_t{});
            case INT64:
                return append(int64_t{});
            default:
                return append(double{});
        }
    }

    void read_tensor() {
        Tensor t;
        t.name = name("tensor name", MAX_NAME);
        std::string where = shown(t.name);
        if (gguf_.tensor_index.contains(t.name)) malformed(where, "expected each tensor once, found it twice");
        uint64_t n_elements = read_shape(where, &t);
        uint32_t id = in_.number<uint32_t>(where);
        const TypeTraits* type = find_type(id);
        if (!type)
            throw Error(PI_ERROR_UNSUPPORTED, where +
                                                  ": expected a tensor of type F32 (0), F16 (1), Q4_0 (2), Q8_0 (8) " +
                                                  "or I32 (26), found type " + str(id));
        t.type = type->type;
        if (t.ne[0] % type->elements != 0)
            malformed(where,
                      "expected rows of a multiple of " + str(type->elements) + " elements, found " + str(t.ne[0]));
        t.n_bytes = checked_mul(n_elements / type->elements, type->bytes, where);
        t.offset = in_.number<uint64_t>(where);
        if (t.offset % alignment_ != 0)
            malformed(where,
                      "expected an offset that is a multiple of " + str(alignment_) + ", found " + str(t.offset));
        gguf_.tensor_index.emplace(t.name, gguf_.tensors.size());
        gguf_.tensors.push_back(std::move(t));
    }

    // Returns the number of elements.
    uint64_t read_shape(const std::string& where, Tensor* t) {
        t->n_dims = in_.number<uint32_t>(where);
        if (t->n_dims < 1 || t->n_dims > MAX_DIMS)
            malformed(where, "expected 1 to " + str(MAX_DIMS) + " dimensions, found " + str(t->n_dims));
        for (uint32_t i = 0; i < t->n_dims; ++i) t->ne[i] = in_.number<uint64_t>(where);
        uint64_t n = 1;
        for (uint64_t ne : t->ne) {
            if (ne == 0) malformed(where, "expected dimensions of at least 1, found 0");
            n = checked_mul(n, ne, where);
        }
        if (n > MAX_ELEMENTS) malformed(where, "expected at most " + str(MAX_ELEMENTS) + " elements, found " + str(n));
        return n;
    }

    // Turns offsets in the data into offsets in the file: one tensor after the other, nothing but padding between
    // them, nothing behind the last.
    void place_tensors() {
        uint64_t end = gguf_.data_offset, file_bytes = gguf_.file_bytes;
        for (Tensor& t : gguf_.tensors) {
            std::string where = shown(t.name);
            uint64_t expected = checked_align_up(end, alignment_, where);
            t.offset = checked_add(t.offset, gguf_.data_offset, where);
            if (t.offset != expected)
                malformed(where, "expected data from byte " + str(expected) + " on, found " +
                                     (t.offset < expected ? "an overlap: byte " : "a hole: byte ") + str(t.offset));
            end = checked_add(t.offset, t.n_bytes, where);
            if (end > file_bytes)
                throw Error(PI_ERROR_TRUNCATED, where + ": expected data up to byte " + str(end) +
                                                    ", found the end of the file at byte " + str(file_bytes));
        }
        if (end > file_bytes)
            throw Error(PI_ERROR_TRUNCATED,
                        "expected padding up to byte " + str(end) + ", found the end at byte " + str(file_bytes));
        if (end < file_bytes)
            malformed("end of file", "expected it at byte " + str(end) + ", found " + str(file_bytes - end) +
                                         " bytes of trailing data");
    }

    Cursor in_;
    Gguf gguf_;
    uint64_t alignment_ = DEFAULT_ALIGNMENT;
};

const Value& value_of(const Gguf& gguf, const std::string& key, const char* expected) {
    auto found = gguf.metadata.find(key);
    if (found == gguf.metadata.end())
        throw Error(PI_ERROR_MISMATCH, key + ": expected " + expected + ", found no such key");
    return found->second;
}

[[noreturn]] void wrong_value(const std::string& key, const char* expected, const Value& value) {
    std::string found = value.type == ARRAY ? "an array of " + str(value.n) + " of type " + str(value.element_type)
                                            : "a value of type " + str(value.type);
    if (value.type == STRING) found = "a string of " + str(value.n) + " bytes";
    throw Error(PI_ERROR_MISMATCH, key + ": expected " + expected + ", found " + found);
}

void read_fd(void* user, uint64_t offset, size_t n, void* out) {
    int fd = *static_cast<const int*>(user);
    auto* at = static_cast<uint8_t*>(out);
    while (n > 0) {
        ssize_t got = pread(fd, at, n, static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw Error(PI_ERROR_IO, std::string("cannot be read: ") + std::strerror(errno));
        if (got == 0) throw Error(PI_ERROR_TRUNCATED, "was cut at byte " + str(offset) + " while it was read");
        at += got, offset += static_cast<uint64_t>(got), n -= static_cast<size_t>(got);
    }
}

}  // namespace

uint64_t checked_add(uint64_t a, uint64_t b, std::string_view what) {
    uint64_t sum;
    if (__builtin_add_overflow(a, b, &sum)) malformed(what, str(a) + " + " + str(b) + " exceeds 64 bits");
    return sum;
}

uint64_t checked_mul(uint64_t a, uint64_t b, std::string_view what) {
    uint64_t product;
    if (__builtin_mul_overflow(a, b, &product)) malformed(what, str(a) + " * " + str(b) + " exceeds 64 bits");
    return product;
}

uint64_t checked_align_up(uint64_t n, uint64_t alignment, std::string_view what) {
    return checked_add(n, alignment - 1, what) & ~(alignment - 1);
}

const char* type_name(Type type) { return traits(type).name; }
uint64_t block_elements(Type type) { return traits(type).elements; }
uint64_t block_bytes(Type type) { return traits(type).bytes; }

uint64_t row_bytes(Type type, uint64_t n) {
    const TypeTraits& t = traits(type);
    if (n % t.elements != 0)
        malformed(t.name, "expected rows of a multiple of " + str(t.elements) + " elements, found " + str(n));
    return checked_mul(n / t.elements, t.bytes, t.name);
}

uint64_t Gguf::u(const std::string& key) const {
    constexpr char EXPECTED[] = "an integer of at least 0";
    const Value& value = value_of(*this, key, EXPECTED);
    bool whole = scalar_bytes(value.type) != 0 && value.type != FLOAT32 && value.type != FLOAT64 && value.type != BOOL;
    if (!whole || (is_signed(value.type) && static_cast<int64_t>(value.bits) < 0)) wrong_value(key, EXPECTED, value);
    return value.bits;
}

bool Gguf::b(const std::string& key) const {
    const Value& value = value_of(*this, key, "a boolean");
    if (value.type != BOOL) wrong_value(key, "a boolean", value);
    return value.bits != 0;
}

double Gguf::f(const std::string& key) const {
    const Value& value = value_of(*this, key, "a float");
    if (value.type == FLOAT32) return std::bit_cast<float>(static_cast<uint32_t>(value.bits));
    if (value.type == FLOAT64) return std::bit_cast<double>(value.bits);
    wrong_value(key, "a float", value);
}

std::string_view Gguf::s(const std::string& key) const {
    const Value& value = value_of(*this, key, "a short string");
    if (value.type != STRING || value.n > MAX_TEXT) wrong_value(key, "a short string", value);
    return value.text;
}

const std::vector<double>& Gguf::numbers(const std::string& key) const {
    const Value& value = value_of(*this, key, "an array of numbers");
    if (value.type != ARRAY || value.numbers.size() != value.n) wrong_value(key, "an array of numbers", value);
    return value.numbers;
}

bool Gguf::has(const std::string& key) const { return metadata.contains(key); }

const Tensor* Gguf::find(const std::string& name) const {
    auto found = tensor_index.find(name);
    return found == tensor_index.end() ? nullptr : &tensors[found->second];
}

Gguf read_gguf(const Source& source) { return Reader(source).read(); }

Gguf read_gguf_memory(const uint8_t* data, size_t n) {
    auto copy = [](void* user, uint64_t offset, size_t size, void* out) {
        std::memcpy(out, static_cast<const uint8_t*>(user) + offset, size);
    };
    return read_gguf({const_cast<uint8_t*>(data), n, copy});
}

Gguf read_gguf_file(const char* path, int* fd_out) {
    // O_NONBLOCK: opening a pipe must not wait for a writer; files ignore it
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) throw Error(PI_ERROR_IO, std::string("cannot be opened: ") + std::strerror(errno));
    try {
        struct stat info;
        if (fstat(fd, &info) != 0) throw Error(PI_ERROR_IO, std::string("cannot be read: ") + std::strerror(errno));
        if (!S_ISREG(info.st_mode)) throw Error(PI_ERROR_IO, "expected a file, found something else");
        Gguf gguf = read_gguf({&fd, static_cast<uint64_t>(info.st_size), read_fd});
        *fd_out = fd;
        return gguf;
    } catch (...) {
        close(fd);
        throw;
    }
}

}  // namespace pi
