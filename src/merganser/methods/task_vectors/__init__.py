"""Task vectors δᵢ = θᵢ − θ₀, transformed before they are added to the base model."""
