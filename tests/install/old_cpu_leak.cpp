// The mistake that test_old_cpus.py is there for, in small: an inline function in two objects, of which one
// is compiled for a newer processor. The linker keeps the copy of the object that it sees first, for
// everyone.
inline void twice(float* p, int n) {
  for (int i = 0; i < n; ++i) p[i] *= 2;
}

void newer(float* p, int n);

#ifdef NEWER
void newer(float* p, int n) { twice(p, n); }
#else
int main(int argc, char**) {
  float values[64] = {1};
  if (argc > 5) newer(values, 64);  // on a newer processor only
  twice(values, 64);
  return values[0] == 2 ? 0 : 1;
}
#endif
