#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Checks what `make` needs of the machine: Python >= 3.10 with venv and headers, and a C++20 compiler.
# Prints one line that supplies what is missing, and fails.  usage: prerequisites.sh PYTHON
python=${1:-python3}
cxx=${CXX:-c++}
missing="" apt="" dnf=""
need() { missing="$missing\n  $1" apt="$apt $2" dnf="$dnf $3"; }

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  if command -v "$python" >/dev/null; then
    echo "$python is $("$python" --version 2>&1); needed is 3.10 or newer. Name one: make PYTHON=python3.12" >&2
    exit 1
  fi
  case $python in
    python3.[0-9]*) need "Python >= 3.10 ('$python')" "$python $python-venv $python-dev" "$python $python-devel" ;;
    *) need "Python >= 3.10 ('$python')" "python3 python3-venv python3-dev" "python3 python3-devel" ;;
  esac
else
  name=python3
  case $python in python3.[0-9]*) name=$python ;; esac
  "$python" -c 'import venv, ensurepip' 2>/dev/null || need "Python's venv and ensurepip" "$name-venv" "$name"
  "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || need "Python.h" "$name-dev" "$name-devel"
fi
# What the sources use of a compiler: C++20, and the vector shuffles that g++ has known since 12.
if ! echo '#include <bit>
#include <span>
using V = int __attribute__((vector_size(16)));
V reverse(V v) { return __builtin_shufflevector(v, v, 3, 2, 1, 0); }
int main() { return std::bit_cast<int>(0.0f); }' | $cxx -std=c++20 -x c++ - -o /dev/null 2>/dev/null; then
  if command -v ${cxx%% *} >/dev/null; then
    echo "$cxx ($($cxx -dumpfullversion 2>/dev/null)) is too old; needed is g++ 12 or clang 16 or newer. Name one: make CXX=g++-12 (apt-get install -y g++-12)" >&2
    exit 1
  fi
  need "a C++20 compiler ('$cxx')" g++ gcc-c++
fi

if [ -n "$missing" ]; then
  printf "Missing:$missing\nThis line supplies it:\n" >&2
  sudo="sudo "
  [ "$(id -u)" != 0 ] || sudo=""
  if command -v dnf >/dev/null; then
    echo "  ${sudo}dnf install -y$dnf" >&2
  else
    echo "  ${sudo}apt-get update && ${sudo}apt-get install -y$apt" >&2
  fi
  exit 1
fi
