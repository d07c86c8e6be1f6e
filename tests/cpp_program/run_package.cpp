// run_package LIBRARY PACKAGE INPUTS OUTPUTS: the model of a .pt2 file on the tensors of a file, as torch.save writes
// them.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>

int main(int count, char** arguments) try {
  if (count != 5) throw std::runtime_error("run_package LIBRARY PACKAGE INPUTS OUTPUTS");
  if (!dlopen(arguments[1], RTLD_NOW)) throw std::runtime_error(dlerror());  // registers the operators
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  std::ifstream file(arguments[3], std::ios::binary);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  const c10::IValue saved = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> inputs;
  for (const c10::IValue& input : saved.toListRef()) inputs.push_back(input.toTensor());
  const auto written = torch::jit::pickle_save(model.run(inputs).at(0));
  std::ofstream(arguments[4], std::ios::binary).write(written.data(), written.size());
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
