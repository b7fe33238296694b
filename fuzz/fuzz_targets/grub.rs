#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    vimg_fuzz::grub(data);
});
