// Memory of one task of attention_kernels.h: what is packed, and what is summed.
namespace varlen_sft {
namespace {
namespace VARLEN_ISA {

// Cuts one piece of memory into aligned arrays. With base 0 it only counts.
struct Arena {
  uintptr_t base;
  int64_t used = 0;
  template <typename U>
  U* take(int64_t n) {  // n may be 0
    U* p = reinterpret_cast<U*>(base + used);
    used += round_up(n * static_cast<int64_t>(sizeof(U)), 64);
    return p;
  }
};

template <typename T>
struct Geometry {
  int64_t queries, keys, keys_padded, turned_stride, width;
  Geometry(int64_t queries, int64_t keys, int64_t head_dim)
      : queries(queries),
        keys(keys),
        keys_padded(round_up(keys, kTile)),
        turned_stride(keys_padded + 32),  // off powers of two, which would share cache sets
        width(round_up(head_dim, kTile)) {}
};

// Blocks of queries of up to kStack heads: their rows, and the forms in which products need them.
// Rows and words of all heads follow each other.
template <typename T>
struct QueryBlocks {
  int64_t width;
  Packed<T>* rows;  // (stack, kQueries, width)
  Word<T>* turned;  // (stack, width / kPair, kQueries)
  Word<T>* paired;  // (stack, kQueries / kPair, width)

  QueryBlocks(Arena& arena, int64_t stack, int64_t width)
      : width(width),
        rows(arena.take<Packed<T>>(stack * kQueries<T> * width)),
        turned(arena.take<Word<T>>(stack * kQueries<T> * width / kPair)),
        paired(kPair > 1 ? arena.take<Word<T>>(stack * kQueries<T> * width / kPair)
                         : reinterpret_cast<Word<T>*>(rows)) {}

  Word<T>* turned_of(int64_t i) const { return turned + i * kQueries<T> * width / kPair; }

  void read(int64_t i, const AttentionHeads& from, int64_t head, int64_t begin, int64_t n,
            int64_t head_dim, bool pair) {
    Packed<T>* own = rows + i * kQueries<T> * width;
    pack_rows<T>(own, from, head, begin, n, kQueries<T>, head_dim, width);
    transpose(turned_of(i), kQueries<T>, reinterpret_cast<const Word<T>*>(own), width / kPair,
              kQueries<T>, width / kPair);
    if (pair) pair_rows<T>(paired + i * kQueries<T> * width / kPair, own, kQueries<T>, width);
  }
};

template <typename T>
struct Scratch {
  using C = Compute<T>;
  Packed<T>*k_rows, *v_rows, *turned;
  Word<T>* paired;
  QueryBlocks<T> q, dout, out;
  C *scores, *dscores, *sum_turned, *sum_rows, *dk, *dv;
  Packed<T>*p_rows, *ds_rows;  // (kStrip, stack * kQueries)
  Word<T>* words;

  Scratch(Arena& arena, const Geometry<T>& g, int64_t stack)
      : k_rows(arena.take<Packed<T>>(g.keys_padded * g.width)),
        v_rows(arena.take<Packed<T>>(g.keys_padded * g.width)),
        turned(arena.take<Packed<T>>(g.turned_stride * g.width)),
        paired(arena.take<Word<T>>(g.keys_padded * g.width / kPair)),
        q(arena, std::max<int64_t>(1, stack), g.width),
        dout(arena, stack, g.width),
        out(arena, stack ? 1 : 0, g.width),
        scores(arena.take<C>(kStrip * kQueries<T>)),
        dscores(arena.take<C>(stack ? kStrip * kQueries<T> : 0)),
        sum_turned(arena.take<C>(std::max<int64_t>(1, stack) * kQueries<T> * g.width)),
        sum_rows(arena.take<C>(kQueries<T> * g.width)),
        dk(arena.take<C>(stack ? g.keys_padded * g.width : 0)),
        dv(arena.take<C>(stack ? g.keys_padded * g.width : 0)),
        p_rows(arena.take<Packed<T>>(stack * kStrip * kQueries<T>)),
        ds_rows(arena.take<Packed<T>>(stack * kStrip * kQueries<T>)),
        words(arena.take<Word<T>>(kStrip * kQueries<T> / kPair)) {}
};

template <typename T>
int64_t attention_scratch(int64_t keys, int64_t head_dim, int64_t stack) {
  Arena arena{0};
  Scratch<T>(arena, Geometry<T>(0, keys, head_dim), std::min(kStack, stack));
  return arena.used;
}

}  // namespace VARLEN_ISA
}  // namespace
}  // namespace varlen_sft
