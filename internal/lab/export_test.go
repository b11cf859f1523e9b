package lab

// Patient is patient, for the tests of the package lab_test.
var Patient = patient
