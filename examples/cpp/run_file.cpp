// Run a model on raw tensors: run_file INPUT.bin OUTPUT.bin, inputs and outputs one after another
// in the order of the model, as numpy's tofile writes them.
#include <fstream>
#include <iostream>

#include "model.hpp"

int main(int count, char** words) try {
  if (count != 3) throw std::runtime_error("usage: run_file INPUT.bin OUTPUT.bin");
  std::ifstream source(words[1], std::ios::binary);
  std::vector<std::vector<char>> buffers;
  std::vector<std::pair<const void*, std::size_t>> inputs;
  for (const mpqc::Tensor& tensor : mpqc::Model::inputs()) {
    buffers.emplace_back(tensor.bytes);
    if (!source.read(buffers.back().data(), static_cast<std::streamsize>(tensor.bytes)))
      throw std::runtime_error("too short for input " + tensor.name);
  }
  for (const auto& buffer : buffers) inputs.emplace_back(buffer.data(), buffer.size());

  mpqc::Model model(2);
  std::ofstream result(words[2], std::ios::binary);
  const auto outputs = model.run(inputs);
  for (std::size_t i = 0; i < outputs.size(); i++) {
    result.write(reinterpret_cast<const char*>(outputs[i].data()),
                 static_cast<std::streamsize>(outputs[i].size()));
    std::cout << mpqc::Model::outputs()[i].name << ": " << outputs[i].size() << " bytes\n";
  }
  return result.flush() ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << "run_file: " << error.what() << "\n";
  return 2;
}
