fn main() { println!("rvmm"); }
