// Choices of a call as text: "forward=3,8,1;grad_query=3;grad_key=2,7", of every pass groups, blocks and, forward, rows
// of units at once.
#pragma once

#include <cstring>

#include "local_plan.h"

namespace cogview::cuda {

// False: it is not of that form. Passes, and numbers at the end, may be left out; null and "" choose nothing.
inline bool read_choices(const char* text, StripChoices* choices) {
  *choices = {};
  if (!text || !*text) return true;
  const struct {
    const char* name;
    StripChoice* choice;
    int numbers;
  } passes[] = {{"forward=", &choices->forward, 3},
                {"grad_query=", &choices->grad_query, 2},
                {"grad_key=", &choices->grad_key, 2}};
  for (bool seen[3] = {};; ++text) {
    int i = 0;
    while (i < 3 && std::strncmp(text, passes[i].name, std::strlen(passes[i].name))) ++i;
    if (i == 3 || seen[i]) return false;
    seen[i] = true, text += std::strlen(passes[i].name);
    int* const numbers[] = {&passes[i].choice->groups, &passes[i].choice->blocks, &passes[i].choice->unit_rows};
    for (int n = 0;; ++n, ++text) {
      if (n == passes[i].numbers || *text < '0' || *text > '9') return false;
      for (; *text >= '0' && *text <= '9'; ++text)
        if ((*numbers[n] = 10 * *numbers[n] + *text - '0') > 99) return false;
      if (*text != ',') break;
    }
    if (!*text) return true;
    if (*text != ';') return false;
  }
}

}  // namespace cogview::cuda
