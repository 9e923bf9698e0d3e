// What the library shows to Python: functions marked so, with C names that begin with `headrace_`.
#pragma once

#define HEADRACE_EXPORT extern "C" __attribute__((visibility("default")))
