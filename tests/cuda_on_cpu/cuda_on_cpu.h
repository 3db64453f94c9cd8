// Enough of CUDA to run a kernel on a CPU, one block at a time: a std::thread for each CUDA thread,
// real barriers, and warp functions that exchange values between lanes. Where a kernel lacks a
// barrier, threads run into each other here as they may on a GPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

namespace cuda_on_cpu {

struct Warp {
  std::barrier<> barrier{32};
  uint64_t lanes[32];
};

struct Block {
  explicit Block(int threads) : barrier(threads) {
    for (int i = 0; i < threads / 32; ++i) warps.push_back(std::make_unique<Warp>());
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

struct Index {
  unsigned x;
};

inline Block* block;
inline Index block_index, grid_size;
inline thread_local Index thread_index;

// Gives f the values of all 32 lanes.
template <typename T, typename F>
auto in_warp(T value, F f) {
  Warp& warp = *block->warps[thread_index.x / 32];
  std::memcpy(&warp.lanes[thread_index.x % 32], &value, sizeof(T));
  warp.barrier.arrive_and_wait();
  T lanes[32];
  for (int i = 0; i < 32; ++i) std::memcpy(&lanes[i], &warp.lanes[i], sizeof(T));
  warp.barrier.arrive_and_wait();  // nobody writes before all have read
  return f(lanes);
}

template <typename F>
void run_block(int threads, const F& kernel) {
  Block here(threads);
  block = &here;
  std::vector<std::thread> running;
  for (int i = 0; i < threads; ++i)
    running.emplace_back([&kernel, i] {
      thread_index.x = i;
      kernel();
    });
  for (std::thread& thread : running) thread.join();
}

// The last block runs first: on a GPU any order may be, and what relies on one relies on 0, 1, 2.
template <typename F>
void launch(int blocks, int threads, const F& kernel) {
  grid_size.x = blocks;
  for (int i = blocks; i-- > 0;) {
    block_index.x = i;
    run_block(threads, kernel);
  }
}

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index
#define gridDim cuda_on_cpu::grid_size

// Later warps are slow to go on, so that what the first one does too early is seen by the others.
inline void __syncthreads() {
  cuda_on_cpu::block->barrier.arrive_and_wait();
  std::this_thread::sleep_for(std::chrono::milliseconds(5 * (threadIdx.x / 32)));
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_on_cpu::in_warp(value, [&](const T* lanes) { return lanes[lane % 32]; });
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % 32;
  return cuda_on_cpu::in_warp(
      value, [&](const T* lanes) { return lanes[lane >= distance ? lane - distance : lane]; });
}

inline unsigned __ballot_sync(unsigned, bool value) {
  return cuda_on_cpu::in_warp(value, [](const bool* lanes) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= unsigned{lanes[i]} << i;
    return bits;
  });
}

template <typename T>
T __reduce_max_sync(unsigned, T value) {
  return cuda_on_cpu::in_warp(value,
                              [](const T* lanes) { return *std::max_element(lanes, lanes + 32); });
}

template <typename T>
T atomicMax(T* address, T value) {
  std::atomic_ref<T> shared(*address);
  T old = shared.load();
  while (old < value && !shared.compare_exchange_weak(old, value)) {
  }
  return old;
}
