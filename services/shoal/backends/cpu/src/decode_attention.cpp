// Attention of one row each of many sequences. The time goes into reading K and V: each is read, and two tokens' V laid
// side by side for a dot product, once for the query heads that share it, and a long context is cut into parts for the
// threads, which are then put together.

#include <algorithm>
#include <cmath>
#include <vector>

#include "crew.hpp"
#include "kernels.hpp"
#include "pairs.hpp"

namespace shoal {
namespace {

constexpr int CHUNK = 64;
constexpr int TOGETHER = 4;  // query heads that share what is loaded: their sums for 64 channels fit into registers
constexpr int64_t MIN_PART = 128;
constexpr int64_t JOINED = 16;  // heads at a time

// What a head made of a part of its context: `sums` of 2^(score - top) * V, their channels in the order of `pair`, and
// `total` of 2^(score - top). `top` is a whole number: however a context is cut, the powers are the same but for a power
// of two, and so is what they are rounded to.
template <int D>
struct Part {
    float sums[D] = {};
    float top = LOWEST, total = 0;
};

// The tokens of a chunk, where they lie in the pool; up to the next multiple of 16, the last one again.
struct Chunk {
    const bf16* tokens[CHUNK];
    int num_tokens, padded;

    Chunk(const Context& context, int64_t begin, int64_t end)
        : num_tokens((int)std::clamp<int64_t>(end - begin, 0, CHUNK)), padded((num_tokens + 15) / 16 * 16) {
        for (int i = 0; i < padded; i++) tokens[i] = context[begin + std::min(i, num_tokens - 1)];
    }
};

// Fetches the chunk that comes next while one is attended to, some lines with each of its steps: memory is busy
// throughout then. Asked for all at once, it would be waited for.
class Ahead {
   public:
    Ahead(const Chunk& next, int64_t slot_size, int64_t num_steps)
        : next_(next), slot_size_(slot_size), num_lines_(next.num_tokens * (slot_size / LINE)),
          num_steps_(std::max<int64_t>(1, num_steps)) {}

    void step(int64_t number) {
        for (due_ += number * num_lines_; due_ >= num_steps_ && token_ < next_.num_tokens; due_ -= num_steps_) {
            fetch(next_.tokens[token_] + at_);
            if ((at_ += LINE) < slot_size_) continue;
            at_ = 0;
            token_++;
        }
    }

   private:
    const Chunk& next_;
    const int64_t slot_size_, num_lines_, num_steps_;
    int64_t due_ = 0, at_ = 0;
    int token_ = 0;
};

// Of a chunk for `num_heads` heads that share a K/V head, in pairs of tokens: scores take longer.
constexpr int64_t SCORE_STEPS = 3;
constexpr int64_t steps_of(int64_t padded, int64_t num_heads, int64_t head_dim) {
    return num_heads * padded / 16 * SCORE_STEPS + padded / 2 * head_dim / 64;
}

template <int D>
void score(const bf16* query, const Chunk& chunk, int64_t key_at, float factor, float* scores, Ahead& ahead) {
    __m512i own[D / 32];
    for (int j = 0; j < D / 32; j++) own[j] = _mm512_loadu_si512(query + 32 * j);
    for (int i = 0; i < chunk.padded; i += 16) {
        __m512 products[16];
        for (int key = 0; key < 16; key++) {
            const bf16* const numbers = chunk.tokens[i + key] + key_at;
            products[key] = _mm512_setzero_ps();
            for (int j = 0; j < D / 32; j++) {
                const __m512i pairs = _mm512_loadu_si512(numbers + 32 * j);
                each_half([&]<int HALF>() __attribute__((always_inline)) {
                    products[key] = add_products(products[key], factor_of<HALF>(pairs), factor_of<HALF>(own[j]));
                });
            }
        }
        ahead.step(SCORE_STEPS);
        _mm512_store_ps(scores + i, _mm512_mul_ps(sums(products), _mm512_set1_ps(factor)));
    }
    std::fill(scores + chunk.num_tokens, scores + chunk.padded, LOWEST);
}

// Scores of H heads become probabilities; their parts' totals and tops are brought up to date, and `shrink` is by what
// their sums are to shrink. Each step is done for all of them: one head's fills the time that another's last one takes.
template <int D, int H>
void weigh(const float (&scores)[H][CHUNK], int padded, Part<D>* parts, Number (&probabilities)[H][CHUNK],
           __m512 (&shrink)[H]) {
    __m512 most[H], total[H];
    float top[H];
    for (int h = 0; h < H; h++) {
        most[h] = _mm512_set1_ps(parts[h].top);
        total[h] = _mm512_setzero_ps();
    }
    for (int i = 0; i < padded; i += 16)
        for (int h = 0; h < H; h++) most[h] = _mm512_max_ps(most[h], _mm512_load_ps(scores[h] + i));
    for (int h = 0; h < H; h++) top[h] = std::ceil(_mm512_reduce_max_ps(most[h]));
    for (int i = 0; i < padded; i += 16)
        for (int h = 0; h < H; h++) {
            const __m512 probability = exp2(_mm512_sub_ps(_mm512_load_ps(scores[h] + i), _mm512_set1_ps(top[h])));
            store(probabilities[h] + i, probability);
            total[h] = _mm512_add_ps(total[h], probability);
        }
    for (int h = 0; h < H; h++) {
        shrink[h] = _mm512_scalef_ps(_mm512_set1_ps(1), _mm512_set1_ps(parts[h].top - top[h]));  // of whole numbers
        parts[h].total = parts[h].total * _mm512_cvtss_f32(shrink[h]) + _mm512_reduce_add_ps(total[h]);
        parts[h].top = top[h];
    }
}

// 32 channels of two tokens, each with the other's: pairs[0] has the channels 0-3, 8-11, 16-19 and 24-27, pairs[1] the
// others.
inline void pair(const bf16* one, const bf16* two, __m512i* pairs) {
    const __m512i a = _mm512_loadu_si512(one), b = _mm512_loadu_si512(two);
    pairs[0] = _mm512_unpacklo_epi16(a, b);
    pairs[1] = _mm512_unpackhi_epi16(a, b);
}

// 32 sums of such pairs, their channels in order.
inline void store_paired(bf16* to, __m512 low, __m512 high) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    store(to, _mm512_permutex2var_ps(low, first, high));
    store(to + 16, _mm512_permutex2var_ps(low, second, high));
}

// H query heads that share a K/V head.
template <int D, int H>
void add_chunk(const bf16* queries, const Chunk& chunk, int64_t key_at, int64_t value_at, float factor, Part<D>* parts,
               Ahead& ahead) {
    alignas(64) float scores[H][CHUNK];
    alignas(64) Number probabilities[H][CHUNK];
    __m512 shrink[H];
    for (int h = 0; h < H; h++) score<D>(queries + h * D, chunk, key_at, factor, scores[h], ahead);
    weigh<D, H>(scores, chunk.padded, parts, probabilities, shrink);
    for (int channel = 0; channel < D; channel += 64) {
        __m512 mixed[H][4];
        for (int h = 0; h < H; h++)
            for (int j = 0; j < 4; j++)
                mixed[h][j] = _mm512_mul_ps(_mm512_loadu_ps(parts[h].sums + channel + 16 * j), shrink[h]);
        for (int i = 0; i < chunk.num_tokens; i += 2) {  // after an odd one comes the last again, of next to no weight
            ahead.step(1);
            const bf16* const one = chunk.tokens[i] + value_at + channel;
            const bf16* const two = chunk.tokens[i + 1] + value_at + channel;
            __m512i pairs[4];
            pair(one, two, pairs);
            pair(one + 32, two + 32, pairs + 2);
            each_half([&]<int HALF>() __attribute__((always_inline)) {
                for (int h = 0; h < H; h++) {
                    const Factor both = spread_pair<HALF>(probabilities[h] + i);
                    for (int j = 0; j < 4; j++) mixed[h][j] = add_products(mixed[h][j], both, factor_of<HALF>(pairs[j]));
                }
            });
        }
        for (int h = 0; h < H; h++)
            for (int j = 0; j < 4; j++) _mm512_storeu_ps(parts[h].sums + channel + 16 * j, mixed[h][j]);
    }
}

template <int D>
void add_chunk(int num_heads, const bf16* queries, const Chunk& chunk, int64_t key_at, int64_t value_at, float factor,
               Part<D>* parts, Ahead& ahead) {
    switch (num_heads) {
        case 1: return add_chunk<D, 1>(queries, chunk, key_at, value_at, factor, parts, ahead);
        case 2: return add_chunk<D, 2>(queries, chunk, key_at, value_at, factor, parts, ahead);
        case 3: return add_chunk<D, 3>(queries, chunk, key_at, value_at, factor, parts, ahead);
        default: return add_chunk<D, TOGETHER>(queries, chunk, key_at, value_at, factor, parts, ahead);
    }
}

struct Rows {
    const bf16* queries;
    int64_t query_row;
    const int64_t *rows, *slots;
    int64_t first_slot, longest;
    const int64_t* lengths;
    int64_t batch;
    int num_heads, kv_heads;
    float factor;
    bf16* out;
    int num_threads;
};

// So many that the threads can share them evenly, but none too short to be worth it.
int64_t num_parts_of(int64_t batch, int64_t longest, int num_threads) {
    return std::clamp<int64_t>((4 * num_threads + batch - 1) / batch, 1, std::max<int64_t>(1, longest / MIN_PART));
}

// A head's parts, `stride` from one to the next.
template <int D>
void join(const Part<D>* parts, int64_t num_parts, int64_t stride, bf16* out) {
    float top = LOWEST, total = 0, sums[D] = {};
    for (int64_t p = 0; p < num_parts; p++) top = std::max(top, parts[p * stride].top);
    for (int64_t p = 0; p < num_parts; p++) {
        const Part<D>& part = parts[p * stride];
        const float weight = std::exp2(part.top - top);
        total += weight * part.total;
        for (int channel = 0; channel < D; channel++) sums[channel] += weight * part.sums[channel];
    }
    const __m512 share = _mm512_set1_ps(1 / total);
    for (int j = 0; j < D; j += 32)
        store_paired(out + j, _mm512_mul_ps(_mm512_loadu_ps(sums + j), share),
                     _mm512_mul_ps(_mm512_loadu_ps(sums + j + 16), share));
}

// Some of a sequence's tokens.
struct Range {
    Context context;
    int64_t begin, end;
};

// A chunk for all heads: what a token has lies side by side, so memory is read in order. After the last chunk comes
// another range, most likely.
template <int D>
void add_chunks(const Rows& rows, const bf16* queries, const Range& of, const Range& after, Part<D>* parts) {
    const int shared = rows.num_heads / rows.kv_heads;
    for (int64_t at = of.begin; at < of.end; at += CHUNK) {
        const Chunk chunk(of.context, at, of.end);
        const bool is_last = at + CHUNK >= of.end;
        const Chunk next = is_last ? Chunk(after.context, after.begin, after.end) : Chunk(of.context, at + CHUNK, of.end);
        const int64_t num_turns = (shared + TOGETHER - 1) / TOGETHER;  // that V is read
        const int64_t num_steps = steps_of(chunk.padded, shared, 0) + num_turns * steps_of(chunk.padded, 0, D);
        Ahead ahead(next, of.context.slot_size, rows.kv_heads * num_steps);
        for (int kv_head = 0; kv_head < rows.kv_heads; kv_head++)
            for (int first = 0; first < shared; first += TOGETHER) {
                const int head = kv_head * shared + first;
                add_chunk<D>(std::min(TOGETHER, shared - first), queries + head * D, chunk, kv_head * D,
                             (rows.kv_heads + kv_head) * D, rows.factor, parts + head, ahead);
            }
    }
}

// `kept` has room for all parts, where there are several of a sequence.
template <int D>
void attend(const Rows& rows, const bf16* pool, Part<D>* kept) {
    const int64_t heads = rows.num_heads, slot_size = 2 * (int64_t)rows.kv_heads * D;
    const int64_t num_parts = num_parts_of(rows.batch, rows.longest, rows.num_threads);
    const auto join_head = [&](int64_t sequence, int64_t head, const Part<D>* parts, int64_t number) {
        join<D>(parts + head, number, heads, rows.out + (rows.rows[sequence] * heads + head) * D);
    };
    const int64_t num_items = rows.batch * num_parts;
    const auto range = [&](int64_t item) -> Range {
        if (item >= num_items) return {};
        const int64_t sequence = item / num_parts, at = sequence * rows.longest;
        const int64_t length = rows.lengths[sequence], size = (length + num_parts - 1) / num_parts;
        const int64_t begin = std::min(length, item % num_parts * size), end = std::min(length, begin + size);
        return {{pool, rows.slots ? rows.slots + at : nullptr, rows.first_slot + at, slot_size}, begin, end};
    };
    share(num_items, rows.num_threads, [&](int64_t item, Claim& claim) {
        static thread_local std::vector<Part<D>> own;
        own.assign(heads, {});
        const int64_t sequence = item / num_parts;
        add_chunks<D>(rows, rows.queries + rows.rows[sequence] * rows.query_row, range(item),
                      range(item + rows.num_threads), own.data());
        if (!claim()) return;
        if (num_parts > 1) std::copy(own.begin(), own.end(), kept + item * heads);
        else for (int64_t head = 0; head < heads; head++) join_head(sequence, head, own.data(), 1);
    });
    if (num_parts > 1)
        share_ranges(rows.batch * heads, JOINED, rows.num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; item++) {
                const int64_t sequence = item / heads;
                join_head(sequence, item % heads, kept + sequence * num_parts * heads, num_parts);
            }
        });
}

}  // namespace

int64_t kept_by_attention(int64_t batch, int64_t longest, int num_heads, int head_dim, int num_threads) {
    const int64_t num_parts = num_parts_of(batch, longest, num_threads);
    return num_parts > 1 ? batch * num_parts * num_heads * (head_dim + 2) : 0;
}

int attend_decode(const void* queries, int64_t query_row, const int64_t* at, const void* pool, const int64_t* slots,
                  int64_t first_slot, int64_t longest, const int64_t* lengths, int64_t batch, int num_heads, int kv_heads,
                  int head_dim, float scale, void* out, int num_threads, float* kept) {
    const Rows rows = {static_cast<const bf16*>(queries), query_row, at, slots, first_slot, longest, lengths, batch,
                       num_heads, kv_heads, scale * LOG2_E, static_cast<bf16*>(out), num_threads};
    const bf16* const held = static_cast<const bf16*>(pool);
    switch (head_dim) {
        case 64: return attend<64>(rows, held, reinterpret_cast<Part<64>*>(kept)), 0;
        case 128: return attend<128>(rows, held, reinterpret_cast<Part<128>*>(kept)), 0;
        case 256: return attend<256>(rows, held, reinterpret_cast<Part<256>*>(kept)), 0;
        default: return 1;
    }
}

}  // namespace shoal

// Of queries [rows, num_heads, D] (query_row numbers between rows) those at `rows` [batch], each over lengths[i] tokens
// at slots [batch, longest], or without them at first_slot and what follows; out is [rows, num_heads, D], contiguous.
// Returns 0, or 1 if it can't.
extern "C" int shoal_attend_decode(const void* queries, int64_t query_row, const int64_t* at, const void* pool,
                                   const int64_t* slots, int64_t first_slot, int64_t longest, const int64_t* lengths,
                                   int64_t batch, int num_heads, int kv_heads, int head_dim, float scale, void* out,
                                   int num_threads) {
    using namespace shoal;
    std::vector<float> kept(kept_by_attention(batch, longest, num_heads, head_dim, num_threads));
    return attend_decode(queries, query_row, at, pool, slots, first_slot, longest, lengths, batch, num_heads, kv_heads,
                         head_dim, scale, out, num_threads, kept.data());
}
