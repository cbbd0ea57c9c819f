// A compiled model as a C++ class: memory and instance go with the object, errors are exceptions.
#pragma once

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "model.h"

namespace mpqc {

struct Error : std::runtime_error {
  explicit Error(int code) : std::runtime_error(mpqc_message(code)), status(code) {}
  int status;
};

inline void check(int status) {
  if (status != MPQC_OK) throw Error(status);
}

struct Tensor {
  std::string name, dtype;
  std::vector<std::int64_t> shape;
  std::size_t bytes;
};

class Model {
 public:
  explicit Model(int threads = 1) {
    mpqc_model* made = nullptr;
    check(mpqc_create(threads, &made));
    instance_.reset(made);
  }

  static std::vector<Tensor> inputs() { return list(mpqc_input_count(), mpqc_describe_input); }
  static std::vector<Tensor> outputs() { return list(mpqc_output_count(), mpqc_describe_output); }

  // One buffer an input; returns one buffer an output, all in the order of inputs(), outputs().
  std::vector<std::vector<std::byte>> run(
      const std::vector<std::pair<const void*, std::size_t>>& given) {
    if (given.size() != static_cast<std::size_t>(mpqc_input_count())) throw Error(MPQC_WRONG_SIZE);
    std::vector<const void*> in;
    std::vector<std::size_t> in_sizes, out_sizes;
    for (const auto& [data, bytes] : given) in.push_back(data), in_sizes.push_back(bytes);
    std::vector<std::vector<std::byte>> results;
    for (const Tensor& tensor : outputs()) results.emplace_back(tensor.bytes);
    std::vector<void*> out;
    for (auto& result : results) out.push_back(result.data()), out_sizes.push_back(result.size());
    check(mpqc_run(instance_.get(), in.data(), in_sizes.data(), out.data(), out_sizes.data()));
    return results;
  }

 private:
  template <typename Describe>
  static std::vector<Tensor> list(int count, Describe describe) {
    std::vector<Tensor> found;
    for (int i = 0; i < count; i++) {
      mpqc_tensor t;
      check(describe(i, &t));
      found.push_back({t.name, t.dtype, {t.shape, t.shape + t.rank}, t.bytes});
    }
    return found;
  }

  struct Destroy {
    void operator()(mpqc_model* model) const { mpqc_destroy(model); }
  };
  std::unique_ptr<mpqc_model, Destroy> instance_;
};

}  // namespace mpqc
