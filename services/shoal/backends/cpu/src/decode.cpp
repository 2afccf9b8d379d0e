// A step of sequences that each go on by their last token. Where they read and write the pool, and by which angles they
// are rotated, follows from their blocks and lengths. For any step model/reads.py and model/rope.py say so; of this one,
// of which there are the most, that would take longer than some layers.
#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "layers.hpp"
#include "simd.hpp"

namespace shoal {
namespace {

// What backends/cpu/layers.py calls Decoding.
struct Decoding {
    int64_t num_rows;
    void* hidden;
    const int64_t* sequences;  // of each its number of tokens, that of its blocks, and these
    int64_t block_tokens;
    const Rope* ropes;  // of all positions
    int64_t num_ropes;
    const int64_t* windows;  // of each kind of layer what it sees, 0 for all
    int64_t num_kinds;
    const Head* head;
};

struct Sequence {
    int64_t length;
    const int64_t* blocks;

    int64_t slot(int64_t token, int64_t block_tokens) const {
        return blocks[token / block_tokens] * block_tokens + token % block_tokens;
    }
    // Of the tokens from `first` on, and the last one's once more until there are `number`.
    void put_slots(int64_t first, int64_t number, int64_t block_tokens, int64_t* to) const {
        int64_t* const end = to + number;
        for (int64_t token = first; token < length;) {
            const int64_t begin = slot(token, block_tokens);
            const int64_t size = std::min(block_tokens - token % block_tokens, length - token);
            for (int64_t i = 0; i < size; i++) *to++ = begin + i;
            token += size;
        }
        std::fill(to, end, to[-1]);
    }
};

// How layers of one kind read. Sequences that see a like number of tokens, within a factor of two, go together: little
// is padded.
class View {
   public:
    void fill(const std::vector<Sequence>& sequences, int64_t window, int64_t block_tokens) {
        rows_.clear();
        lengths_.clear();
        groups_.clear();
        int64_t num_slots = 0;
        for (int width = 1; width < 64 && rows_.size() < sequences.size(); width++) {
            const size_t begin = rows_.size();
            int64_t longest = 0;
            for (size_t row = 0; row < sequences.size(); row++) {
                const int64_t seen = window ? std::min(window, sequences[row].length) : sequences[row].length;
                if (std::bit_width((uint64_t)seen) != width) continue;
                rows_.push_back((int64_t)row);
                lengths_.push_back(seen);
                longest = std::max(longest, seen);
            }
            const int64_t batch = (int64_t)(rows_.size() - begin);
            if (batch) groups_.push_back({nullptr, nullptr, 0, longest, nullptr, batch});
            num_slots += batch * longest;
        }
        slots_.resize(num_slots);
        int64_t member = 0, *at = slots_.data();
        for (Group& group : groups_) {
            group.rows = rows_.data() + member;
            group.lengths = lengths_.data() + member;
            const int64_t* const slots = at;
            for (const int64_t end = member + group.batch; member < end; member++, at += group.longest) {
                const Sequence& of = sequences[rows_[member]];
                of.put_slots(of.length - lengths_[member], group.longest, block_tokens, at);
            }
            // In one run they need not be looked up.
            group.first_slot = *slots;
            const bool is_run = std::adjacent_find(slots, (const int64_t*)at, [](int64_t a, int64_t b) {
                                    return b != a + 1;
                                }) == at;
            group.slots = is_run ? nullptr : slots;
        }
    }
    Reads reads() const { return {groups_.data(), (int64_t)groups_.size(), nullptr, 0}; }

   private:
    std::vector<int64_t> rows_, lengths_, slots_;
    std::vector<Group> groups_;
};

// What is kept from one step for the next: it's as large.
struct Planned {
    std::vector<Sequence> sequences;
    std::vector<int64_t> slots;
    std::vector<bf16> angles;
    std::vector<Rope> ropes;
    std::vector<View> views;
    std::vector<Reads> reads;

    bool plan(const Decoding& of, int64_t half) {
        sequences.clear();
        slots.clear();
        const int64_t* at = of.sequences;
        for (int64_t row = 0; row < of.num_rows; row++) {
            const Sequence sequence = {at[0], at + 2};
            if (sequence.length < 1 || sequence.length > at[1] * of.block_tokens) return false;
            sequences.push_back(sequence);
            slots.push_back(sequence.slot(sequence.length - 1, of.block_tokens));
            at += 2 + at[1];
        }
        ropes.clear();
        angles.resize(2 * of.num_ropes * of.num_rows * half);
        bf16* to = angles.data();
        const auto looked_up = [&](const void* table) {
            const bf16* const begin = to;
            for (const Sequence& sequence : sequences) {
                std::memcpy(to, static_cast<const bf16*>(table) + (sequence.length - 1) * half, sizeof(bf16) * half);
                to += half;
            }
            return begin;
        };
        for (int64_t i = 0; i < of.num_ropes; i++) {
            const bf16* const cos = looked_up(of.ropes[i].cos);
            ropes.push_back({cos, looked_up(of.ropes[i].sin)});
        }
        views.resize(of.num_kinds);
        reads.clear();
        for (int64_t kind = 0; kind < of.num_kinds; kind++) {
            views[kind].fill(sequences, of.windows[kind], of.block_tokens);
            reads.push_back(views[kind].reads());
        }
        return true;
    }
};

}  // namespace
}  // namespace shoal

// The states `hidden` [num_rows, hidden_size] of sequences' last tokens go through all layers, whose pools get their K/V,
// and the head. Returns 0, or 1 if a sequence has no tokens, or more than its blocks hold, or one of the kernels can't.
extern "C" int shoal_decode(const void* shape, const void* layers, int64_t num_layers, const void* decoding,
                            int num_threads) {
    using namespace shoal;
    static thread_local Planned planned;
    const Decoding& of = *static_cast<const Decoding*>(decoding);
    if (!planned.plan(of, static_cast<const Shape*>(shape)->head_dim / 2)) return 1;
    const Step step = {of.num_rows, of.hidden, planned.slots.data(), planned.ropes.data(), planned.reads.data(), of.head};
    return shoal_layers(shape, layers, num_layers, &step, num_threads);
}
