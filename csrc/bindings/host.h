// torch's threads and memory, for the CPU engines.
#pragma once

#include "../cpu/host.h"

#include <vector>

#include "common.h"

namespace cogview {
namespace {

class TorchHost : public Host {
 public:
  explicit TorchHost(const Tensor& like) : like_(like) {
    threads = static_cast<int>(torch::stable::get_num_threads());
    parallel = [](int64_t count, const std::function<void(int64_t)>& f) {
      torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) f(i);
      });
    };
    memory = [this](int64_t bytes) {
      buffers_.push_back(torch::stable::new_empty(like_, {bytes + 64}, ScalarType::Byte));
      const auto at = reinterpret_cast<uintptr_t>(buffers_.back().mutable_data_ptr());
      return reinterpret_cast<char*>((at + 63) & ~uintptr_t(63));
    };
  }
  TorchHost(const TorchHost&) = delete;  // memory is kept here

 private:
  const Tensor& like_;
  mutable std::vector<Tensor> buffers_;
};

}  // namespace
}  // namespace cogview
