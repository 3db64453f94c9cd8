// Compiles the kernels in VARLEN_KERNELS once per instruction set, each into a namespace of its
// own, so that one portable binary runs AVX-512 or AVX2 code where the CPU has it. `#pragma GCC
// target` is used and not target_clones because GCC splits vector types into baseline pieces before
// it makes the clones. A kernel file includes no standard header: an inline function compiled under the
// pragma could be the copy that the linker keeps for everybody. With VARLEN_WITH_AMX the kernels
// are compiled a fourth time, for bf16 matrix tiles.
#if !defined(VARLEN_KERNELS)
#error "define VARLEN_KERNELS as the kernel header before including each_isa.h"
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VARLEN_X86 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define VEC_FN static inline __attribute__((always_inline))
#define VEC_MEMBER inline __attribute__((always_inline))

// The by-value ABI of wide vectors differs between instruction sets; every function that takes one
// is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(VARLEN_X86)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define VARLEN_ISA avx512
#define VARLEN_VECTOR_BYTES 64
#include "vec_math.h"
#include VARLEN_KERNELS
#undef VARLEN_ISA
#undef VARLEN_VECTOR_BYTES
#pragma GCC pop_options

#if defined(VARLEN_WITH_AMX)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#pragma GCC target("amx-tile,amx-bf16")
#define VARLEN_ISA amx
#define VARLEN_AMX 1
#define VARLEN_VECTOR_BYTES 64
#include "vec_math.h"
#include VARLEN_KERNELS
#undef VARLEN_ISA
#undef VARLEN_AMX
#undef VARLEN_VECTOR_BYTES
#pragma GCC pop_options
#endif

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define VARLEN_ISA avx2
#define VARLEN_VECTOR_BYTES 32
#include "vec_math.h"
#include VARLEN_KERNELS
#undef VARLEN_ISA
#undef VARLEN_VECTOR_BYTES
#pragma GCC pop_options
#endif

#define VARLEN_ISA baseline
#define VARLEN_VECTOR_BYTES 16
#include "vec_math.h"
#include VARLEN_KERNELS
#undef VARLEN_ISA
#undef VARLEN_VECTOR_BYTES

namespace varlen_sft {
namespace {

enum class Isa { baseline, avx2, avx512 };

// ATEN_CPU_CAPABILITY (torch's own variable: default, avx2 or avx512) caps the choice, so that one
// machine can test every path. It is read once per process.
inline Isa detect_isa() {
#if defined(VARLEN_X86)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string cap = variable ? variable : "";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && cap != "avx2" && cap != "default") return Isa::avx512;
  if (has_avx2 && cap != "default") return Isa::avx2;
#endif
  return Isa::baseline;
}

inline Isa current_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

#if defined(VARLEN_WITH_AMX) && defined(VARLEN_X86)
// Linux keeps the tile registers from a process until it asks for them.
inline bool ask_for_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
// Any cap of ATEN_CPU_CAPABILITY but "amx" leaves the tiles out.
inline bool has_tiles() {
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string cap = variable ? variable : "amx";
  static const bool has = current_isa() == Isa::avx512 && cap == "amx" &&
                          __builtin_cpu_supports("avx512bf16") &&
                          __builtin_cpu_supports("amx-bf16") && ask_for_tiles();
  return has;
}
#endif

}  // namespace
}  // namespace varlen_sft

// The version of `kernel` (a template name with its arguments) for this CPU, as a function pointer.
#if defined(VARLEN_X86)
#define VARLEN_BEST(...)                                                             \
  (current_isa() == Isa::avx512 ? &avx512::__VA_ARGS__                               \
   : current_isa() == Isa::avx2 ? &avx2::__VA_ARGS__                                 \
                                : &baseline::__VA_ARGS__)
#else
#define VARLEN_BEST(...) (&baseline::__VA_ARGS__)
#endif

// The same for a kernel of dtype T that exists for AMX too: these CPUs also round to bf16 in one
// instruction, so that a bf16 kernel need not use tiles to gain.
#if defined(VARLEN_WITH_AMX) && defined(VARLEN_X86)
#define VARLEN_BEST_FOR(T, ...)                                        \
  ([] {                                                                \
    if constexpr (std::is_same_v<T, c10::BFloat16>)                    \
      if (has_tiles()) return &amx::__VA_ARGS__;                       \
    return VARLEN_BEST(__VA_ARGS__);                                   \
  }())
#else
#define VARLEN_BEST_FOR(T, ...) VARLEN_BEST(__VA_ARGS__)
#endif
