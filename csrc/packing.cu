// pack / unpack on the device.
//
// pack    One launch for all fields. Block (x, f) writes kThreads * 16 consecutive bytes of field
// f;
//         each thread owns 16 aligned bytes (2 to 16 tokens), finds its sequence by binary search
//         on cu_seqlens between the block's first and last sequence, and stores once. Loads are 16
//         bytes where the source is aligned and the thread's tokens lie in one sequence.
// unpack  The reverse, driven by the padded destination, so that padding is written in the same
// pass.
//
// Floor: each byte of each field is read once and written once; cu_seqlens and the addresses (12
// bytes a sequence) stay in cache. Every thread writes its own bytes: no atomics, the result is
// bit-exact.

#include <type_traits>

#include "common.cuh"
#include "packing.h"

namespace grpo {
namespace {

constexpr int kThreads = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where an element comes from: `offset` is the token's place in its sequence s.
template <typename T>
struct PerToken {
  const int64_t* sources;  // of this field
  __device__ const T* run(int s, int64_t offset) const {
    return reinterpret_cast<const T*>(sources[s]) + offset;
  }
  __device__ T operator()(int s, int64_t offset) const { return *run(s, offset); }
};

template <typename T>
struct PerSequence {
  const int64_t* sources;
  __device__ T operator()(int s, int64_t) const { return *reinterpret_cast<const T*>(sources[s]); }
};

struct Position {
  __device__ int64_t operator()(int, int64_t offset) const { return offset; }
};

struct Segment {
  __device__ int32_t operator()(int s, int64_t) const { return s; }
};

template <typename T, typename Source>
__device__ void fill_at(T* out, const int32_t* cu_seqlens, int s, int64_t row, int64_t num_tokens,
                        const Source& source) {
  Vec16<T> value;
  int64_t begin = cu_seqlens[s], end = cu_seqlens[s + 1];
#pragma unroll
  for (int j = 0; j < Vec16<T>::kSize; ++j) {
    if (row + j >= num_tokens) break;
    while (row + j >= end) {  // also over empty sequences
      begin = end;
      end = cu_seqlens[++s + 1];
    }
    value.element[j] = source(s, row + j - begin);
    if (row + Vec16<T>::kSize > num_tokens) out[row + j] = value.element[j];
  }
  if (row + Vec16<T>::kSize <= num_tokens) *reinterpret_cast<Vec16<T>*>(out + row) = value;
}

template <typename T, typename Source>
__device__ void fill(const Field& field, const PlanView& plan, int64_t num_tokens,
                     const Source& source) {
  constexpr int64_t kRowsPerBlock = int64_t{kThreads} * Vec16<T>::kSize;
  const int64_t first_row = blockIdx.x * kRowsPerBlock;
  if (first_row >= num_tokens) return;  // the grid is sized for the widest field

  __shared__ int block_sequences[2];  // of the block's first and last row
  if (threadIdx.x < 2) {
    const int64_t last_row = min(first_row + kRowsPerBlock, num_tokens) - 1;
    block_sequences[threadIdx.x] =
        find_sequence(plan.cu_seqlens, 0, static_cast<int>(plan.num_sequences) - 1,
                      threadIdx.x == 0 ? first_row : last_row);
  }
  __syncthreads();
  const int64_t row = first_row + threadIdx.x * Vec16<T>::kSize;
  if (row >= num_tokens) return;
  const int s = find_sequence(plan.cu_seqlens, block_sequences[0], block_sequences[1], row);
  T* out = reinterpret_cast<T*>(field.destination);

  if constexpr (std::is_same_v<Source, PerToken<T>>) {
    const T* run = source.run(s, row - plan.cu_seqlens[s]);
    if (row + Vec16<T>::kSize <= plan.cu_seqlens[s + 1] && is_aligned16(run)) {
      *reinterpret_cast<Vec16<T>*>(out + row) = *reinterpret_cast<const Vec16<T>*>(run);
      return;
    }
  }
  fill_at(out, plan.cu_seqlens, s, row, num_tokens, source);
}

template <typename T>
__device__ void fill_from_memory(const Field& field, const PlanView& plan, int64_t num_tokens) {
  const int64_t* sources = plan.sources + blockIdx.y * plan.num_sequences;
  if (field.kind == kPerToken) {
    fill<T>(field, plan, num_tokens, PerToken<T>{sources});
  } else {
    fill<T>(field, plan, num_tokens, PerSequence<T>{sources});
  }
}

__global__ void __launch_bounds__(kThreads, 6) pack_kernel(PlanView plan, int64_t num_tokens) {
  const Field field = plan.fields[blockIdx.y];
  if (field.kind == kPosition) {
    fill<int64_t>(field, plan, num_tokens, Position{});
  } else if (field.kind == kSegment) {
    fill<int32_t>(field, plan, num_tokens, Segment{});
  } else if (field.element_size == 1) {
    fill_from_memory<uint8_t>(field, plan, num_tokens);
  } else if (field.element_size == 2) {
    fill_from_memory<uint16_t>(field, plan, num_tokens);
  } else if (field.element_size == 4) {
    fill_from_memory<uint32_t>(field, plan, num_tokens);
  } else {
    fill_from_memory<uint64_t>(field, plan, num_tokens);
  }
}

struct Span {
  int64_t begin, count;
};

// Rows of sequence s, cut to what there is: the host cannot look at a device's cu_seqlens without
// waiting for it, so wrong ones cost wrong values here but never an access outside `packed`.
__device__ inline Span span_of(const int32_t* cu_seqlens, int64_t s, int64_t num_tokens) {
  const int64_t begin = min(max(int64_t{cu_seqlens[s]}, int64_t{0}), num_tokens);
  return {begin, min(int64_t{cu_seqlens[s + 1]}, num_tokens) - begin};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) unpack_kernel(Unpack job) {
  const int64_t num_elements = job.num_sequences * job.row_length;
  const int64_t first =
      (int64_t{blockIdx.x} * kThreads + threadIdx.x) * Vec16<T>::kSize;  // of the destination
  if (first >= num_elements) return;

  const auto* cu_seqlens = reinterpret_cast<const int32_t*>(job.cu_seqlens);
  const auto* packed = reinterpret_cast<const T*>(job.packed);
  auto* out = reinterpret_cast<T*>(job.destination);
  const T pad = static_cast<T>(job.pad_bits);
  int64_t s = first / job.row_length, t = first % job.row_length;
  Span span = span_of(cu_seqlens, s, job.num_tokens);

  const bool whole = first + Vec16<T>::kSize <= num_elements;
  if (whole && t + Vec16<T>::kSize <= min(span.count, job.row_length) &&
      is_aligned16(packed + span.begin + t)) {
    *reinterpret_cast<Vec16<T>*>(out + first) =
        *reinterpret_cast<const Vec16<T>*>(packed + span.begin + t);
    return;
  }
  Vec16<T> value;
#pragma unroll
  for (int j = 0; j < Vec16<T>::kSize; ++j) {
    if (first + j >= num_elements) break;
    if (t == job.row_length) {
      t = 0;
      span = span_of(cu_seqlens, ++s, job.num_tokens);
    }
    value.element[j] = t < span.count ? packed[span.begin + t] : pad;
    if (!whole) out[first + j] = value.element[j];
    ++t;
  }
  if (whole) *reinterpret_cast<Vec16<T>*>(out + first) = value;
}

template <typename T>
void launch_unpack(const Unpack& job, cudaStream_t stream) {
  const int64_t num_elements = job.num_sequences * job.row_length;
  const int64_t num_blocks = ceil_div(num_elements, int64_t{kThreads} * Vec16<T>::kSize);
  unpack_kernel<T><<<static_cast<unsigned>(num_blocks), kThreads, 0, stream>>>(job);
  GRPO_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void pack_cuda(int64_t plan_address, int64_t num_fields, int64_t num_sequences, int64_t num_tokens,
               int device, int64_t stream) {
  if (num_tokens == 0 || num_fields == 0) return;
  const DeviceGuard guard(device);
  const PlanView plan = view_plan(plan_address, num_fields, num_sequences);
  // 8-byte fields need the most blocks; num_tokens < 2^31 keeps this below 2^22.
  const int64_t num_blocks = ceil_div(num_tokens, int64_t{kThreads} * Vec16<int64_t>::kSize);
  const dim3 grid(static_cast<unsigned>(num_blocks), static_cast<unsigned>(num_fields));
  pack_kernel<<<grid, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(plan, num_tokens);
  GRPO_CUDA_CHECK(cudaGetLastError());
}

void unpack_cuda(const Unpack& job, int device, int64_t stream_handle) {
  if (job.num_sequences == 0 || job.row_length == 0) return;
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  switch (job.element_size) {
    case 1:
      return launch_unpack<uint8_t>(job, stream);
    case 2:
      return launch_unpack<uint16_t>(job, stream);
    case 4:
      return launch_unpack<uint32_t>(job, stream);
    default:
      return launch_unpack<uint64_t>(job, stream);
  }
}

std::vector<int> cuda_architectures() {
  std::vector<int> architectures = {__CUDA_ARCH_LIST__};  // nvcc's own list, as 800, 900, ...
  for (int& architecture : architectures) architecture /= 10;
  return architectures;
}

}  // namespace grpo
